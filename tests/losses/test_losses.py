"""dpkd.losses on tensors: values against NumPy, chunks against the dense way, accumulation, what is refused."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from dpkd import losses
from dpkd.api import HIDDEN, Family, LossConfig, LossSpec, Rollout, RolloutInputs, RolloutLoss, Signal
from dpkd.errors import DpkdError, SettingsError
from dpkd.plugins import load_registry

B, T, V, H = 4, 9, 13, 6
SPECS = {name: loss.spec for name, loss in load_registry().losses.items()}
ON_LOGITS = [name for name, s in SPECS.items() if s.family is not Family.PAIR and not HIDDEN & s.signals()]
PAIRS = [name for name, s in SPECS.items() if s.family is Family.PAIR]
POLICIES = [name for name, s in SPECS.items() if s.family is Family.ROLLOUT]


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def batch():
    """Padded on both sides, trained in two places of a row, and a first token that nothing predicts."""
    labels = torch.full((B, T), -100)
    labels[0, 3:7] = torch.tensor([1, 5, 2, 0])
    labels[1, [2, 3, 7, 8]] = torch.tensor([4, 4, 12, 0])
    labels[2, 0:2] = torch.tensor([7, 3])
    labels[3, 8] = 9
    return SimpleNamespace(
        labels=labels,
        student=normal(B, T, V, seed=1).mul(2).requires_grad_(),
        teacher=normal(B, T, V, seed=2).mul(2).requires_grad_(),
        by_student=torch.tensor([True, False, True, False]),
    )


def trained(labels) -> list[tuple[int, int]]:
    """Places whose token is trained, and has one before it."""
    return [(b, t) for b in range(labels.shape[0]) for t in range(1, labels.shape[1]) if labels[b, t] != -100]


def probabilities(logits) -> np.ndarray:
    values = logits.detach().numpy().astype(np.float64)
    weights = np.exp(values - values.max())
    return weights / weights.sum()


def test_jsd_is_the_mean_over_trained_tokens_of_the_row_before_each(batch):
    found = losses.get("jsd", beta=0.3)(student_logits=batch.student, teacher_logits=batch.teacher, labels=batch.labels)
    values = []
    for b, t in trained(batch.labels):
        p, q = probabilities(batch.teacher[b, t - 1]), probabilities(batch.student[b, t - 1])
        m = 0.3 * p + 0.7 * q
        values.append(0.3 * (p * np.log(p / m)).sum() + 0.7 * (q * np.log(q / m)).sum())
    assert len(values) == 10
    assert found.item() == pytest.approx(np.mean(values), rel=1e-12)
    found.backward()
    assert batch.teacher.grad is None
    elsewhere = torch.ones(B, T, dtype=torch.bool)
    elsewhere[tuple(zip(*((b, t - 1) for b, t in trained(batch.labels)), strict=True))] = False
    assert not batch.student.grad[elsewhere].any()
    assert batch.student.grad[~elsewhere].any(-1).all()


def test_dpkd_is_the_mean_over_pairs_of_summed_log_probs(batch):
    """The chosen responses are the first half of the batch; a first token that nothing predicts has no part."""
    found = losses.get("dpkd", beta=0.7, aggregation="sum").from_logits(
        student_logits=batch.student, teacher_logits=batch.teacher, labels=batch.labels
    )
    gap = np.zeros(B)
    for b, t in trained(batch.labels):
        token = int(batch.labels[b, t])
        q, p = probabilities(batch.student[b, t - 1])[token], probabilities(batch.teacher[b, t - 1])[token]
        gap[b] += np.log(q) - np.log(p)
    margins = 0.7 * (gap[:2] - gap[2:])
    assert found.item() == pytest.approx(np.mean(np.log1p(np.exp(-margins))), rel=1e-12)


def arguments(name: str, batch) -> dict[str, torch.Tensor]:
    """What else a loss on tokens reads, with a policy's log-probs taken from the models."""
    loss, others = losses.get(name), {}
    if Signal.BY_STUDENT in loss.reads:
        others["by_student"] = batch.by_student
    if name in POLICIES:
        drawn = {
            "rollout_logps": losses.token_logps(batch.labels, batch.student + 0.1 * normal(B, T, V, seed=3)).detach(),
            "behaviour_logps": losses.token_logps(batch.labels, batch.student + 0.2 * normal(B, T, V, seed=4)).detach(),
            "teacher_logps": losses.token_logps(batch.labels, batch.teacher).detach(),
        }
        others |= {**drawn, "advantages": loss.advantages(labels=batch.labels, **drawn)}
    return others


@pytest.mark.parametrize("name", ON_LOGITS)
def test_accumulation_over_micro_batches_is_the_whole_batch(name, batch):
    """By rows of the batch, with the tokens of all of them as the denominator: value and gradient."""
    loss, others = losses.get(name), arguments(name, batch)
    whole = loss(student_logits=batch.student, teacher_logits=batch.teacher, labels=batch.labels, **others)
    whole.backward()
    wanted, batch.student.grad, total = batch.student.grad, None, 0.0
    for rows in (slice(0, 1), slice(1, 4)):
        part = loss(
            student_logits=batch.student[rows],
            teacher_logits=batch.teacher[rows],
            labels=batch.labels[rows],
            num_items_in_batch=torch.tensor(len(trained(batch.labels))),
            **{key: value[rows] for key, value in others.items()},
        )
        part.backward()
        total += part.item()
    assert total == pytest.approx(whole.item(), rel=1e-9)
    assert wanted.abs().max() > 0
    torch.testing.assert_close(batch.student.grad, wanted, rtol=1e-9, atol=1e-12)


def models():
    """Backbones' hidden states and output layers of a student and a wider teacher."""
    hidden = {"student": normal(B, T, H, seed=5).requires_grad_(), "teacher": normal(B, T, H + 2, seed=6)}
    heads = {"student": nn.Linear(H, V), "teacher": nn.Linear(H + 2, V)}
    torch.manual_seed(0)
    for head in heads.values():
        nn.init.normal_(head.weight)
    return hidden, {who: head.double() for who, head in heads.items()}


@pytest.mark.parametrize("name", [*ON_LOGITS, *PAIRS])
def test_from_hidden_is_the_loss_of_the_logits(name, batch):
    hidden, heads = models()
    loss = losses.get(name)
    logits = {f"{who}_logits": heads[who](hidden[who]) for who in heads}
    others = {} if name in PAIRS else arguments(name, batch)
    reference = {}
    if Signal.REFERENCE_LOGPS in loss.reads:
        reference = {"reference_logits": heads["student"](hidden["student"] * 0.9).detach()}
    dense = loss.from_logits if name in PAIRS else loss
    leaves = [hidden["student"], heads["student"].weight, heads["student"].bias]
    whole = dense(labels=batch.labels, **logits, **others, **reference)
    wanted = torch.autograd.grad(whole, leaves)
    if reference:
        others |= {"reference_hidden": hidden["student"].detach() * 0.9, "reference_head": heads["student"]}
    found = loss.from_hidden(
        hidden["student"], heads["student"], hidden["teacher"], heads["teacher"], batch.labels, **others, chunk_mib=1e-9
    )
    assert found.item() == pytest.approx(whole.item(), rel=1e-9)
    assert max(g.abs().max() for g in wanted) > 0
    for one, other in zip(torch.autograd.grad(found, leaves), wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_log_probs_of_tokens(batch):
    hidden, heads = models()
    found = losses.token_logps(batch.labels, hidden=hidden["student"], head=heads["student"])
    logits = heads["student"](hidden["student"])
    places = trained(batch.labels)
    for b in range(B):
        for t in range(T):
            wanted = 0.0
            if (b, t) in places:
                wanted = np.log(probabilities(logits[b, t - 1])[int(batch.labels[b, t])])
            assert found[b, t].item() == pytest.approx(wanted, rel=1e-9)
    torch.testing.assert_close(losses.token_logps(batch.labels, logits), found)


def test_advantages_know_where_a_response_ends(batch):
    """opd with discount 1: a token's worth is the sum of rewards from it to the end of its own response."""
    loss = losses.get("opd", discount=1.0)
    teacher, student = normal(B, T, seed=7), normal(B, T, seed=8)
    found = loss.advantages(labels=batch.labels, rollout_logps=student, teacher_logps=teacher)
    for b in range(B):
        own = [t for row, t in trained(batch.labels) if row == b]
        for t in range(T):
            wanted = sum((teacher - student)[b, s].item() for s in own if s >= t) if t in own else 0.0
            assert found[b, t].item() == pytest.approx(wanted, abs=1e-12)


def test_padding_of_the_vocabulary(batch):
    """Heads of different sizes are refused until somebody says what they share; then the rest counts for nothing."""
    wider = torch.cat([batch.teacher, torch.full((B, T, 3), 5.0)], -1)
    with pytest.raises(DpkdError, match=r"student has logits for 13 ids and the teacher for 16.*vocabulary="):
        losses.get("kd")(student_logits=batch.student, teacher_logits=wider, labels=batch.labels)
    found = losses.get("kd", vocabulary=11)(
        student_logits=batch.student, teacher_logits=wider, labels=batch.labels.clamp(max=10)
    )
    wanted = losses.get("kd")(
        student_logits=batch.student[..., :11],
        teacher_logits=batch.teacher[..., :11],
        labels=batch.labels.clamp(max=10),
    )
    assert found.item() == pytest.approx(wanted.item(), rel=1e-12)
    with pytest.raises(DpkdError, match=r"vocabulary: is 14, but there are logits for 13"):
        losses.get("kd", vocabulary=14)(student_logits=batch.student, teacher_logits=wider, labels=batch.labels)


def test_a_head_of_a_model_brings_the_models_own_rule(batch):
    from transformers import AutoModelForCausalLM, GraniteConfig

    torch.manual_seed(0)
    config = GraniteConfig(
        vocab_size=V,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=16,
        logits_scaling=0.25,
    )
    model = AutoModelForCausalLM.from_config(config)
    ids = torch.arange(B * T).view(B, T) % V
    out = model(ids, output_hidden_states=True)
    loss = losses.get("sft")
    found = loss.from_hidden(out.hidden_states[-1], model, labels=batch.labels)
    assert found.item() == pytest.approx(loss(student_logits=out.logits, labels=batch.labels).item(), rel=1e-5)
    bare = loss.from_hidden(out.hidden_states[-1], model.lm_head, labels=batch.labels)
    assert abs(bare.item() - found.item()) > 1e-3


def test_hidden_states_of_layers(batch):
    """The mean over trained tokens of the squared distance, from the row before each; weights belong to the module."""
    from transformers import LlamaConfig

    student, teacher = (
        LlamaConfig(num_hidden_layers=n, hidden_size=H, num_attention_heads=1, num_key_value_heads=1) for n in (2, 4)
    )
    loss = losses.get("hidden-mse", pairs=((1, 2), (2, 4)))
    states = [normal(B, T, H, seed=10 + i).requires_grad_() for i in range(3)]
    others = [normal(B, T, H, seed=20 + i) for i in range(5)]
    with pytest.raises(DpkdError, match=r"call loss\.bind"):
        loss(student_hidden=states, teacher_hidden=others, labels=batch.labels)
    loss.bind(student, teacher).double()
    assert [p.shape for p in loss.parameters()] == [(2, H, H)]
    found = loss(student_hidden=states, teacher_hidden=others, labels=batch.labels)
    values = [
        sum(((states[i] - others[j])[b, t - 1].detach().numpy() ** 2).mean() for i, j in ((1, 2), (2, 4)))
        for b, t in trained(batch.labels)
    ]
    assert found.item() == pytest.approx(np.mean(values), rel=1e-12)
    with pytest.raises(DpkdError, match="does not fit the models: projection is none"):
        losses.get("hidden-mse", projection="none").bind(student, LlamaConfig(hidden_size=64))


def test_nothing_trained_is_worth_nothing(batch):
    labels = torch.full_like(batch.labels, -100)
    found = losses.get("jsd")(student_logits=batch.student, teacher_logits=batch.teacher, labels=labels)
    found.backward()
    assert found.item() == 0.0
    assert not batch.student.grad.any()


def test_a_schedule_changes_settings_between_steps(batch):
    loss = losses.get("jsd", beta=0.5)
    values = []
    for beta in (0.5, 0.1):
        loss.set(beta=beta)
        values.append(loss(student_logits=batch.student, teacher_logits=batch.teacher, labels=batch.labels).item())
    fixed = losses.get("jsd", beta=0.1)
    again = fixed(student_logits=batch.student, teacher_logits=batch.teacher, labels=batch.labels).item()
    assert values[1] == again != values[0]
    assert "'jsd', beta=0.1" in repr(loss)
    with pytest.raises(SettingsError, match=r"loss\.beta: should be less than or equal to 1"):
        loss.set(beta=2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: losses.get("jds"), "no loss is called 'jds'; did you mean jsd"),
        (lambda: losses.get("jsd", betta=0.1), r"loss\.betta: no such setting; did you mean loss\.beta"),
        (lambda: losses.get("jsd", beta=2.0), r"loss\.beta: should be less than or equal to 1 \(got 2\.0\)"),
    ],
)
def test_what_get_refuses(make, message):
    with pytest.raises(DpkdError, match=message):
        make()


@pytest.mark.parametrize(
    ("name", "call", "message"),
    [
        ("kd", lambda f, x: f(student_logits=x.student, labels=x.labels), "reads teacher_logits, which is not given"),
        ("kd", lambda f, x: f(teacher_logits=x.student, labels=x.labels), "reads student_logits, which is not given"),
        ("sft", lambda f, x: f(student_logits=x.student[:, 1:], labels=x.labels), r"\[4, 8, 13\], and labels \[4, 9\]"),
        ("kd", lambda f, x: f.from_hidden(x.student, nn.Linear(V, V).double()), "labels: not given"),
        (
            "kd",
            lambda f, x: f.from_hidden(x.student, nn.Linear(V, V).double(), x.teacher, labels=x.labels),
            "teacher_head: not given",
        ),
        ("kd", lambda f, x: f.from_hidden(x.student, nn.ReLU(), labels=x.labels), "found ReLU"),
        ("dpkd", lambda f, x: f.from_logits(student_logits=x.student[:3], labels=x.labels[:3]), "3 responses are no"),
        ("opd", lambda f, x: f(student_logits=x.student, labels=x.labels), "reads advantages, behaviour_logps"),
        ("dpkd", lambda f, x: f(student_logps=(x.student[0, 0], x.student[0, 1])), "reads lengths, teacher_logps"),
    ],
)
def test_what_a_loss_refuses(name, call, message, batch):
    with pytest.raises(DpkdError, match=message):
        call(losses.get(name), batch)


def test_available_names_every_installed_loss():
    found = losses.available()
    assert list(found) == sorted(SPECS)
    assert found["jsd"] == SPECS["jsd"].card.summary
    assert len({*ON_LOGITS, *PAIRS}) > 40
    assert len(POLICIES) >= 2


def test_a_spec_of_ones_own_is_a_loss_too(batch):
    found = losses.get(SPECS["kd"], temperature=2.0)
    assert found.config.temperature == 2.0


def test_the_import_brings_torch_and_nothing_heavier():
    code = (
        "import sys, dpkd.losses; print(*{'transformers', 'accelerate', 'datasets', 'peft', 'pandas'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def hinge(student_logps, rejected_scale: float = 1.0):
    """A margin of 1 between chosen and rejected."""
    return (1 - student_logps.chosen + rejected_scale * student_logps.rejected).clamp(min=0)


def negative_likelihood(student_logits, targets):
    return -student_logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def test_functions_are_losses(batch):
    found = losses.get(negative_likelihood)(student_logits=batch.student, labels=batch.labels)
    wanted = losses.get("sft")(student_logits=batch.student, labels=batch.labels)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-12)
    pair = losses.get(hinge, rejected_scale=0.5)
    logps = (torch.tensor([-1.0, -2.0]), torch.tensor([-1.0, -8.0]))
    assert pair(student_logps=logps).item() == pytest.approx(((1 + 1 - 0.5) + 0.0) / 2)
    assert pair.spec.card.summary == "A margin of 1 between chosen and rejected."
    with pytest.raises(SettingsError, match=r"loss\.scale: no such setting"):
        losses.get(hinge, scale=2)
    with pytest.raises(DpkdError, match="reads tokens and pairs"):
        losses.get(lambda student_logits, student_logps: student_logits)


def test_a_policy_loss_may_use_a_reward_and_the_others_to_its_prompt(batch):
    """Leave-one-out: the reward of a response less the mean of the others to its prompt."""

    class LeaveOneOut(RolloutLoss[LossConfig]):
        def advantages(self, rollout: Rollout) -> torch.Tensor:
            rewards = torch.tensor([float(len(text)) for text in rollout.responses], dtype=torch.float64)
            same = (rollout.prompt.unsqueeze(0) == rollout.prompt.unsqueeze(1)).double().fill_diagonal_(0)
            return (rewards - same @ rewards / same.sum(1))[rollout.sequence]

        def forward(self, x: RolloutInputs) -> torch.Tensor:
            return -x.advantages * x.student_logps()

    reads = frozenset({Signal.STUDENT_LOGITS, Signal.TARGETS, Signal.ADVANTAGES})
    spec = LossSpec("rloo", LeaveOneOut, LossConfig, SPECS["opd"].card, reads)
    zeros = torch.zeros(B, T)
    found = losses.get(spec).advantages(
        labels=batch.labels,
        rollout_logps=zeros,
        teacher_logps=zeros,
        prompt=torch.tensor([0, 0, 1, 1]),
        responses=["a", "abc", "", "abcdef"],
    )
    for b, t in trained(batch.labels):
        assert found[b, t].item() == [-2.0, 2.0, -6.0, 6.0][b]
