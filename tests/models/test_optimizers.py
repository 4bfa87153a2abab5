"""Every optimizer by name: it trains, its state is counted, and a checkpoint continues it bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, get_scheduler

from dpkd.config.settings import TrainSettings
from dpkd.models.optimizers import OPTIMIZERS, state_bytes, weights_of
from dpkd.train import checkpoint
from dpkd.train.optimizers import describe_optimizer, learning_rate, make_optimizer

# On a CPU its state is not paged; the update is the same.
pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")

# All rows of the table, and some that transformers makes.
NAMES = [*OPTIMIZERS, "lion", "adamw_8bit", "paged_adamw_8bit", "ademamix", "lion_8bit", "rmsprop", "adagrad"]


def student(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(vocab_size=96, n_positions=16, n_embd=64, n_layer=1, n_head=2))


def settings(name: str, **more: object) -> TrainSettings:
    return TrainSettings(optimizer=name, lr=1e-2, **more)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> float:
    torch.manual_seed(number)
    ids = torch.randint(0, 96, (4, 12))
    loss = model(input_ids=ids, labels=ids).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("name", NAMES)
def test_it_trains_and_its_state_takes_what_is_counted(name: str) -> None:
    model, run = student(), settings(name)
    optimizer = make_optimizer(model, run)
    losses = [step(model, optimizer, 1) for _ in range(5)]
    assert losses[-1] < losses[0]
    tensors = {
        (id(p), key): value
        for p, state in optimizer.state.items()
        for key, value in state.items()
        if torch.is_tensor(value) and value.ndim > 0 and not key.startswith("qmap")  # one table for all parameters
    }
    held = sum(value.numel() * value.itemsize for value in tensors.values())
    assert state_bytes(model, name, run.own_optimizer_settings) == held


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_continues_it_bit_for_bit(name: str, tmp_path: Path) -> None:
    model, run = student(), settings(name)
    optimizer = make_optimizer(model, run)
    for number in range(3):
        step(model, optimizer, number)
    saved = checkpoint.save(
        tmp_path, 3, module=model, optimizer=optimizer, sources={}, loop={}, random_states=[{}], is_main=True
    )
    for number in range(3, 6):
        step(model, optimizer, number)
    again = student(seed=7)
    other = make_optimizer(again, run)
    checkpoint.load(saved, module=again, optimizer=other, rank=1, processes=2, device=torch.device("cpu"))
    for number in range(3, 6):
        step(again, other, number)
    for ours, theirs in zip(weights(again), weights(model), strict=True):
        assert torch.equal(ours, theirs)


def test_muon_gets_hidden_matrices_alone() -> None:
    model = student()
    hidden = {id(w.parameter) for w in weights_of(model) if w.is_hidden_matrix}
    names = {name for name, p in model.named_parameters() if id(p) in hidden}
    assert names == {f"transformer.h.0.{n}.weight" for n in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")}
    optimizer = make_optimizer(model, settings("muon"))
    step(model, optimizer, 0)
    kept = {name: set(optimizer.state[p]) for name, p in model.named_parameters()}
    assert {name for name, keys in kept.items() if "momentum_buffer" in keys} == names
    assert {name for name, keys in kept.items() if "exp_avg_sq" in keys} == kept.keys() - names


def test_a_rate_that_is_set_in_the_groups_is_the_rate_of_muon_too() -> None:
    model = student()
    optimizer = make_optimizer(model, settings("muon"))
    before = weights(model)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    step(model, optimizer, 0)
    assert all(torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_vectors_do_not_decay(name: str) -> None:
    optimizer = make_optimizer(student(), settings(name, weight_decay=0.1))
    for group in optimizer.param_groups:
        for p in group["params"]:
            assert group["weight_decay"] == (0.1 if p.ndim >= 2 else 0.0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"optimizer": "adam"}, "should be one of adamw, adafactor, muon, sgd, lion, adamw_torch, "),
        ({"optimizer": "muon", "optimizer_settings": {"betas": [0.9, 0.99]}}, r"optimizer_settings\.betas: no such"),
        ({"optimizer": "sgd", "optimizer_settings": {"momentum": 1.5}}, r"optimizer_settings\.momentum: .*less than 1"),
        ({"optimizer": "rmsprop", "optimizer_settings": {"rho": 0.9}}, r"optimizer_settings\.rho: no such setting"),
        ({"optimizer": "adamx"}, r"stable_adamw \(got 'adamx'; did you mean adamw\?\)"),
        ({"optimizer": "galore_adamw"}, "should be one of adamw"),
        ({"schedule": "polynomial", "schedule_settings": {"cycles": 2}}, "polynomial has no setting cycles.*power"),
        ({"schedule": "cosine", "schedule_settings": {"num_cycles": 2}}, "cosine has no settings but"),
        ({"schedule": "warmup_stable_decay"}, "warmup_stable_decay: "),
    ],
)
def test_what_cannot_be_is_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainSettings(**values)


def test_a_package_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.trainer_optimizer.is_bitsandbytes_available", lambda: False)
    with pytest.raises(ValueError, match="paged_lion_8bit cannot be used here: You need to install `bitsandbytes`"):
        TrainSettings(optimizer="paged_lion_8bit")


def test_settings_of_transformers_optimizers_are_the_arguments_of_their_class() -> None:
    run = settings("rmsprop", optimizer_settings={"alpha": 0.9, "momentum": 0.5}, weight_decay=0.1, eps=1e-6)
    optimizer = make_optimizer(student(), run)
    assert type(optimizer) is torch.optim.RMSprop
    assert {(g["alpha"], g["momentum"], g["centered"]) for g in optimizer.param_groups} == {(0.9, 0.5, False)}
    assert "rmsprop (RMSprop by transformers), alpha 0.9, momentum 0.5, lr 0.01" in describe_optimizer(run)
    lion = make_optimizer(student(), settings("lion"))
    assert {tuple(group["betas"]) for group in lion.param_groups} == {(0.9, 0.99)}
    adam = make_optimizer(student(), settings("adamw_8bit", betas=(0.8, 0.95), eps=1e-5))
    assert {(tuple(group["betas"]), group["eps"]) for group in adam.param_groups} == {((0.8, 0.95), 1e-5)}


SCHEDULES = {
    "constant_with_warmup": {},
    "cosine_with_restarts": {"num_cycles": 3},
    "cosine_with_min_lr": {"min_lr_rate": 0.1},
    "polynomial": {"power": 2.0, "lr_end": 1e-5},
    "inverse_sqrt": {"timescale": 10},
    "warmup_stable_decay": {"num_decay_steps": 8},
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_of_transformers_are_followed_after_the_warm_up(name: str) -> None:
    run = TrainSettings(lr=0.3, warmup_steps=5, schedule=name, schedule_settings=SCHEDULES[name])
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    reference = get_scheduler(name, optimizer, 5, 40, SCHEDULES[name])
    for number in range(40):
        expected = reference.get_last_lr()[0] if number >= 5 else 0.3 * (number + 1) / 5
        assert learning_rate(number, 40, run) == pytest.approx(expected, rel=1e-12)
        optimizer.step()
        reference.step()


def test_the_plan_says_all_of_it() -> None:
    run = settings("muon", schedule="polynomial", schedule_settings={"power": 2.0})
    assert describe_optimizer(run) == (
        "muon (Muon on hidden matrices, AdamW on the rest), momentum 0.95, nesterov True, ns_steps 5, lr 0.01 "
        "polynomial, power 2.0, warm-up 0"
    )
