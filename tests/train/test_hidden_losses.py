"""Losses on hidden states in whole runs: the right rows of the right layers, one forward, weights that are trained."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from test_invariants import gradients
from toy_runs import assert_same_model

from dpkd.api import HIDDEN, Layers, Stack
from dpkd.errors import DpkdError, SettingsError
from dpkd.run_metrics import read_metrics
from dpkd.teachers.local import TeacherRows
from dpkd.train import checkpoint, run
from dpkd.train.cache import cache
from dpkd.train.hidden_states import check_stack, stack_of
from dpkd.train.plan import make_plan
from dpkd.train.progress import Display
from dpkd.train.resume import resume_folder

WIDER = {"student.init": "pretrained", "student.layers": None}
EXTRA = {"terms.extra.far": {"loss": "hidden-mse", "weight": 0.5, "settings": {"pairs": [[1, 2], [2, 4]]}}}


def _close(found, wanted):
    assert found.keys() == wanted.keys()
    for name in found:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-9, atol=1e-12)


def _states(model, ids):
    return model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states


def test_value_and_gradient_are_those_of_the_models_own_hidden_states(settings_of, quiet):
    """Each sequence by itself, unpadded, from transformers' own output; layer 2 of the student is after its norm."""
    resolved = settings_of("hidden-mse", {"train.batch_size": 3, "train.micro_batch_size": 2})
    found, metrics, train_step = gradients(resolved, quiet)
    loss_module, teacher, tokens, total = train_step.inner, train_step.teacher.model, 0, 0.0
    loss_module.zero_grad()
    run_parts = run.assemble(resolved, run._accelerator(resolved), Display(quiet))
    for i in run_parts.builder.groups[0].source.context.batches.window(0):
        prompt = run_parts.run_data.data.prompts[i]
        ids, first = [*prompt.prompt_ids, *prompt.response_ids], len(prompt.prompt_ids) - 1
        ours, theirs = _states(loss_module.student, ids), _states(teacher, ids)
        for matrix, (s, t) in zip(loss_module.losses["main"].weight, [(1, 2), (2, 4)], strict=True):
            gap = ours[s][0, first:-1] @ matrix.T - theirs[t][0, first:-1].detach()
            total = total + gap.square().mean(-1).sum()
        tokens += len(prompt.response_ids)
    (total / tokens).backward()
    assert metrics["loss/main"] == pytest.approx((total / tokens).item(), rel=1e-9)
    gradient = {n: p.grad for n, p in loss_module.named_parameters() if p.grad is not None}
    zero = {n: torch.zeros_like(g) for n, g in found.items()}
    _close(found, {**zero, **gradient})
    assert found["losses.main.weight"].abs().max() > 0


def test_checkpointing_and_accumulation_change_nothing(settings_of, quiet):
    common = {"train.batch_size": 8, **EXTRA}
    whole, metrics, _ = gradients(settings_of("kd", common), quiet)
    assert metrics["loss/far"] > 0
    for other in ({"student.gradient_checkpointing": True}, {"train.micro_batch_size": 1}):
        _close(gradients(settings_of("kd", common | other), quiet)[0], whole)


def test_it_adds_its_gradient_to_the_main_loss_in_the_same_forward(settings_of, quiet):
    kd, _, train_step = gradients(settings_of("kd"), quiet)
    forwards = train_step.teacher.forwards
    alone = gradients(settings_of("hidden-mse", {"loss.pairs": [[1, 2], [2, 4]]}), quiet)[0]
    both, metrics, train_step = gradients(settings_of("kd", EXTRA), quiet)
    assert train_step.teacher.forwards == forwards
    assert both.pop("losses.far.weight").abs().max() > 0
    for name, gradient in kd.items():  # Llama's norm micro-batches in float32 on the way back, whatever it gets
        torch.testing.assert_close(both[name], gradient + 0.5 * alone[name], rtol=1e-4, atol=1e-6)
    found, metrics, _ = gradients(settings_of("dpkd", EXTRA), quiet)  # beside pairs it has a text of its own
    assert {"loss/main", "loss/far"} <= metrics.keys()
    assert found["losses.far.weight"].abs().max() > 0


def test_no_logits_are_made_that_nothing_reads(settings_of, quiet, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(TeacherRows, "logits", lambda *_: pytest.fail("nobody reads the teacher's logits"))
        found = gradients(settings_of("sft", EXTRA), quiet)[0]
    assert found["losses.far.weight"].abs().max() > 0
    rows = []
    monkeypatch.setattr("dpkd.models.chunked.chunks", lambda count, size, starts: rows.append(count) or iter(()))
    gradients(settings_of("hidden-mse"), quiet)
    assert set(rows) == {0}


def test_no_states_are_asked_for_where_no_loss_reads_them(settings_of, quiet, monkeypatch):
    monkeypatch.setattr("dpkd.models.layers.every_state", lambda model: pytest.fail("asked for hidden states"))
    gradients(settings_of("kd"), quiet)


@pytest.mark.parametrize("changes", [{}, {"student.lora": {"r": 4}, "student.gradient_checkpointing": True}])
def test_weights_of_the_loss_are_trained_kept_and_restored(changes, settings_of, quiet, stops, tmp_path, toy):
    changes = {"train.steps": 4, **EXTRA, **changes}
    whole = run.train(settings_of("kd", changes), console=quiet)

    with stops():
        run.train(settings_of("kd", changes | {"output": str(tmp_path / "stopped")}), console=quiet)
    torch.manual_seed(999)
    continued = resume_folder(tmp_path / "stopped", console=quiet)
    weights = [load_file(checkpoint.latest(f.checkpoints).path / "weights.safetensors") for f in (whole, continued)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not torch.equal(weights[0]["losses.far.weight"], torch.eye(32).expand(2, -1, -1)), "not trained"
    assert_same_model(whole, continued)
    assert not any("far" in name for name in load_file(continued.model / "model.safetensors"))


def test_another_width_and_architecture(settings_of, toy, quiet, tmp_path):
    """A GPT-2 of width 32 beside a teacher of width 48; its projection starts with orthonormal columns."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    config = LlamaConfig(
        vocab_size=257,
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=64,
        bos_token_id=256,
        eos_token_id=256,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "wide")
    AutoTokenizer.from_pretrained(toy / "teacher").save_pretrained(tmp_path / "wide")
    changes = WIDER | {"student.model": str(toy / "gpt2"), "train.steps": 6, "train.precision": "bf16"}
    for loss in ("hidden-mse", "hidden-cosine"):
        folder = run.train(settings_of(loss, changes, teacher=str(tmp_path / "wide")), console=quiet)
        lines = read_metrics(folder.metrics)
        assert lines[-1]["loss/main"] < lines[0]["loss/main"]
    refused = settings_of(
        "hidden-mse", changes | {"loss.projection": "none", "output": "no"}, teacher=str(tmp_path / "wide")
    )
    with pytest.raises(DpkdError, match=r"hidden-mse does not fit the models: projection is none, but .* 32 .* 48"):
        make_plan(refused, Display(quiet))


@pytest.mark.parametrize(
    ("pairs", "found"),
    [([[3, 4]], "hidden state 3 of the student, which has 0"), ([[1, -1]], "hidden state -1 of the teacher")],
)
def test_layers_that_do_not_exist_are_refused_in_the_plan(pairs, found, settings_of, quiet):
    with pytest.raises(DpkdError, match=f"the loss hidden-cosine asks for the {found}"):
        make_plan(settings_of("hidden-cosine", {"loss.pairs": pairs}), Display(quiet))


def test_a_store_and_no_teacher_are_refused(settings_of, toy, quiet, tmp_path):
    student = WIDER | {"student.model": str(toy / "gpt2")}
    cache(settings_of("kd", student), tmp_path / "store", k=4, console=quiet)
    with pytest.raises(SettingsError, match="hidden states, which the store does not have"):
        settings_of("hidden-mse", student | {"teacher.store": str(tmp_path / "store")}, teacher=None)
    with pytest.raises(SettingsError, match="the loss hidden-mse needs its hidden states"):
        settings_of("hidden-mse", student, teacher=None)


def test_logits_and_hidden_states_in_one_loss_are_refused(settings_of, quiet, monkeypatch):
    from dpkd.api import Signal

    resolved = settings_of("hidden-mse")
    monkeypatch.setattr(type(resolved.loss), "signals", lambda spec, config=None: HIDDEN | {Signal.STUDENT_LOGITS})
    with pytest.raises(DpkdError, match=r"reads hidden states beside student_logits: .* Make it two token losses"):
        make_plan(resolved, Display(quiet))


def test_a_model_whose_states_are_not_as_its_configuration_says(toy):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(toy / "gpt2")
    assert stack_of(model.config) == Stack(2, 32)
    check_stack(model)
    check_stack(None)
    model.config.num_hidden_layers = 3
    with pytest.raises(DpkdError, match=r"GPT2LMHeadModel gives 3 hidden states of widths \[32\], where .* 3 \+ 1"):
        check_stack(model)


def test_the_plan_says_which_layers_are_compared(settings_of, quiet):
    plan = make_plan(settings_of("kd", {"terms.extra.far": {"loss": "hidden-mse"}}), Display(quiet))
    assert ("hidden states of far", "student's 1, 2; teacher's 2, 4") in plan.sections["loss"]


def test_the_layers_of_a_work_are_those_of_its_losses(settings_of, quiet):
    two = {**EXTRA, "terms.extra.last": {"loss": "hidden-cosine"}}
    _, _, train_step = gradients(settings_of("kd", two), quiet)
    assert train_step.inner.layers == {"far": Layers((1, 2), (2, 4)), "last": Layers((2,), (4,))}
