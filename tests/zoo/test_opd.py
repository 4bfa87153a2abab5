"""`opd`: which gradient each estimator has, by visiting every response over three tokens; rewards and ratios."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from dpkd_zoo.opd import SPEC, OPDConfig, OPDLoss
from oracles import log_probs, returns
from torch import Tensor
from zoo_inputs import FLOAT64, one_sequence, randn

from dpkd.api import Rollout, RolloutInputs, Signal, TeacherAccess, Text
from dpkd.testing import Outcome, check_loss
from dpkd.testing.rollout_checks import sequence_reverse_kl

LONGEST, END, TOKENS = 3, 0, 3
DRAWN = itertools.product(range(TOKENS), repeat=LONGEST)
RESPONSES = sorted({y[: y.index(END) + 1] if END in y else y for y in DRAWN})
PREFIXES = sorted({y[:t] for y in RESPONSES for t in range(len(y))})
STUDENT, TEACHER, OTHER = (randn(len(PREFIXES), TOKENS, seed=seed, scale=1.0) for seed in (1, 2, 3))


def _inputs(table: Tensor, drawn: Tensor, config: OPDConfig) -> tuple[RolloutInputs, Tensor]:
    """All tokens of all responses under a policy that drew them; and the probability of each token's response."""
    place = torch.tensor([PREFIXES.index(y[:t]) for y in RESPONSES for t in range(len(y))])
    ids = torch.tensor([v for y in RESPONSES for v in y])
    number = torch.tensor([i for i, y in enumerate(RESPONSES) for _ in y])
    old, behaviour, teacher = (logits.log_softmax(-1)[place, ids] for logits in (table.detach(), drawn, TEACHER))
    worth = OPDLoss(config).advantages(Rollout(old, behaviour, teacher, number))
    log_share = torch.zeros(len(RESPONSES), dtype=FLOAT64).index_add(0, number, behaviour)
    assert log_share.exp().sum().item() == pytest.approx(1)
    signals = {
        Signal.STUDENT_LOGITS: table[place],
        Signal.TARGETS: ids,
        Signal.ADVANTAGES: worth,
        Signal.ROLLOUT_LOGPS: old,
        Signal.BEHAVIOUR_LOGPS: behaviour,
        Signal.TEACHER_LOGPS: teacher,
    }
    return RolloutInputs({k: v for k, v in signals.items() if k in SPEC.signals(config)}), log_share.exp()[number]


def _expected_gradient(drawn: Tensor, **settings: Any) -> np.ndarray:
    """Σ_y drawn(y) ∇ Σ_t value_t."""
    table = STUDENT.clone().requires_grad_()
    config = OPDConfig(**settings)
    x, share = _inputs(table, drawn, config)
    (OPDLoss(config)(x) * share).sum().backward()
    assert table.grad is not None
    return table.grad.numpy()


def _token_gradient(direction: str, drawn: Tensor) -> np.ndarray:
    """Σ over prefixes of the probability of drawing it times the gradient of its KL, in loops of plain floats."""
    gradient = np.zeros((len(PREFIXES), TOKENS))
    log_drawn = [log_probs(row) for row in drawn.tolist()]
    for i, prefix in enumerate(PREFIXES):
        reach = math.exp(sum(log_drawn[PREFIXES.index(prefix[:t])][prefix[t]] for t in range(len(prefix))))
        log_q, log_p = log_probs(STUDENT[i].tolist()), log_probs(TEACHER[i].tolist())
        kl = sum(math.exp(a) * (a - b) for a, b in zip(log_q, log_p, strict=True))
        for v in range(TOKENS):
            q, p = math.exp(log_q[v]), math.exp(log_p[v])
            gradient[i, v] = reach * (q * (log_q[v] - log_p[v] - kl) if direction == "reverse" else q - p)
    return gradient


def test_the_enumeration_has_responses_of_all_lengths() -> None:
    assert {len(y) for y in RESPONSES} == {1, 2, 3}
    assert len(RESPONSES) == 1 + 2 + 4 * 3
    assert np.abs(_token_gradient("reverse", STUDENT) - _token_gradient("forward", STUDENT)).max() > 0.01


@pytest.mark.parametrize("importance", [True, False])
@pytest.mark.parametrize(("estimator", "direction"), [("k1", "reverse"), ("k2", "reverse"), ("k3", "forward")])
def test_which_kl_each_estimator_descends(estimator: str, direction: str, importance: bool) -> None:
    """On fresh text: k1 (as a reward) and k2 the reverse KL of each token, k3 the forward KL."""
    found = _expected_gradient(STUDENT, estimator=estimator, importance=importance)
    np.testing.assert_allclose(found, _token_gradient(direction, STUDENT), atol=1e-12)


@pytest.mark.parametrize(("estimator", "direction"), [("k1", "reverse"), ("k2", "reverse"), ("k3", "forward")])
def test_importance_weights_correct_for_text_that_another_policy_drew(estimator: str, direction: str) -> None:
    """Token by token; the prefixes are those of the policy that drew."""
    weighed = _expected_gradient(OTHER, estimator=estimator)
    np.testing.assert_allclose(weighed, _token_gradient(direction, OTHER), atol=1e-12)
    unweighed = _expected_gradient(OTHER, estimator=estimator, importance=False)
    assert np.abs(unweighed - _token_gradient(direction, OTHER)).max() > 0.01


def test_k1_as_a_plain_loss_would_have_no_gradient_at_all() -> None:
    """Why it is not offered: Σ_v q(v) ∇ log q(v) = 0, whatever the teacher."""
    table = STUDENT.clone().requires_grad_()
    x, share = _inputs(table, STUDENT, OPDConfig(estimator="k2"))
    ((x.student_logps() - x.teacher_logps) * share).sum().backward()
    assert table.grad is not None
    assert table.grad.abs().max().item() < 1e-12


def test_discount_one_is_the_reverse_kl_of_whole_responses() -> None:
    table = STUDENT.clone().requires_grad_()
    value = torch.zeros((), dtype=FLOAT64)
    for y in RESPONSES:
        where = [PREFIXES.index(y[:t]) for t in range(len(y))]
        log_q = table.log_softmax(-1)[where, list(y)].sum()
        value = value + log_q.exp() * (log_q - TEACHER.log_softmax(-1)[where, list(y)].sum())
    value.backward()
    assert table.grad is not None
    np.testing.assert_allclose(_expected_gradient(STUDENT, discount=1.0), table.grad.numpy(), atol=1e-12)
    for other in (0.0, 0.5):
        assert np.abs(_expected_gradient(STUDENT, discount=other) - table.grad.numpy()).max() > 0.01


def _prefixes_held(student: Sequence[Tensor], teacher: Sequence[Tensor], direction: str) -> Tensor:
    """Σ_y sg(q(y)) Σ_t of the one-token KL's sample, its own token's probability alone with a gradient."""
    terms = []
    for log_q, log_p in zip(student, teacher, strict=True):
        share = log_q.detach().sum().exp()
        if direction == "reverse":
            terms.append(share * ((log_q - log_q.detach()).exp() * (log_q - log_p)).sum())
        else:
            terms.append(share * ((log_p - log_q.detach()).exp() * -log_q).sum())
    return torch.stack(terms).sum()


@pytest.mark.parametrize(
    ("settings", "descends"),
    [
        ({}, "reverse"),
        ({"importance": False}, "reverse"),
        ({"clip_epsilon": 0.2}, "reverse"),
        ({"reward_clip": 100.0}, "reverse"),
        ({"discount": 1.0}, "responses"),
        ({"estimator": "k2"}, "reverse"),
        ({"estimator": "k3"}, "forward"),
        ({"estimator": "k3", "importance": False}, "forward"),
    ],
    ids=str,
)
def test_conforms_and_descends_what_the_card_says(settings: dict[str, Any], descends: str) -> None:
    def objective(student: Sequence[Tensor], teacher: Sequence[Tensor], config: object) -> Tensor:
        if descends == "responses":
            return sequence_reverse_kl(student, teacher, config)
        return _prefixes_held(student, teacher, descends)

    report = check_loss(SPEC, config=settings, objective=objective)
    assert report.named(Outcome.WARNED) == ("matches_reference",)


def test_k3_is_not_taken_for_the_reverse_kl() -> None:
    with pytest.raises(AssertionError, match="expected gradient of the surrogate"):
        check_loss(SPEC, config={"estimator": "k3"}, objective=lambda q, p, config: _prefixes_held(q, p, "reverse"))


TEACHER_LOGPS = [-0.5, -0.25, -0.125]
OLD = [t - r for t, r in zip(TEACHER_LOGPS, [1.0, 2.0, 4.0], strict=True)]


@pytest.mark.parametrize(
    ("settings", "worth"),
    [
        ({}, [1, 2, 4]),
        ({"discount": 1.0}, [7, 6, 4]),
        ({"discount": 0.5}, [3, 4, 4]),
        ({"reward_clip": 1.5}, [1, 1.5, 1.5]),
        ({"reward_clip": 1.5, "discount": 1.0}, [4, 3, 1.5]),
    ],
    ids=str,
)
def test_advantages_by_hand(settings: dict[str, Any], worth: list[float]) -> None:
    found = OPDLoss(OPDConfig(**settings)).advantages(one_sequence(OLD, TEACHER_LOGPS))
    assert found.tolist() == pytest.approx(worth)


@pytest.mark.parametrize("discount", [0.0, 0.9, 1.0])
def test_advantages_equal_loops_and_stay_within_their_response(discount: float) -> None:
    lengths = [3, 1, 5, 2]
    teacher, old = randn(sum(lengths), seed=6), randn(sum(lengths), seed=7)
    number = torch.tensor([i for i, n in enumerate(lengths) for _ in range(n)])
    expected, start = [], 0
    for n in lengths:
        expected += returns((teacher - old)[start : start + n].tolist(), discount=discount, include_current=True)
        start += n
    found = OPDLoss(OPDConfig(discount=discount)).advantages(Rollout(old, old + 1, teacher, number))
    assert found.tolist() == pytest.approx(expected)


def test_advantages_carry_no_gradient_and_may_be_empty() -> None:
    old = torch.tensor([-1.0, -2.0], requires_grad=True)
    rollout = Rollout(old, old, torch.tensor([-1.5, -1.0]), torch.zeros(2, dtype=torch.long))
    for discount in (0.0, 1.0):
        loss = OPDLoss(OPDConfig(discount=discount))
        assert not loss.advantages(rollout).requires_grad
        assert loss.advantages(one_sequence([], [])).shape == (0,)


def test_a_token_that_the_teacher_excludes_does_not_spoil_the_others() -> None:
    rollout = one_sequence([-1.0, -1.0, -1.0], [-1.5, -math.inf, -2.0])
    assert OPDLoss(OPDConfig()).advantages(rollout).tolist() == [-0.5, -math.inf, -1]
    clipped = OPDLoss(OPDConfig(reward_clip=10.0, discount=1.0)).advantages(rollout)
    assert clipped.tolist() == pytest.approx([-11.5, -11, -1])


def _one(log_q: float, log_p: float, drawn: float, advantage: float, **settings: Any) -> tuple[float, float]:
    """Value and derivative by log q of one token with these log-probs, V = 2."""
    rest = math.log(-math.expm1(log_q))
    logits = torch.tensor([[log_q, rest]], dtype=FLOAT64, requires_grad=True)
    config = OPDConfig(**settings)
    numbers = {
        Signal.ADVANTAGES: advantage,
        Signal.ROLLOUT_LOGPS: drawn,
        Signal.BEHAVIOUR_LOGPS: drawn,
        Signal.TEACHER_LOGPS: log_p,
    }
    signals: dict[Signal, Any] = {k: torch.tensor([v], dtype=FLOAT64) for k, v in numbers.items()}
    signals |= {Signal.STUDENT_LOGITS: logits, Signal.TARGETS: torch.tensor([0])}
    value = OPDLoss(config)(RolloutInputs({k: v for k, v in signals.items() if k in SPEC.signals(config)}))
    value.sum().backward()
    assert logits.grad is not None
    # log q = z₀ - logsumexp: its derivative by z₀ is 1 - q.
    return value.item(), logits.grad[0, 0].item() / -math.expm1(log_q)


@pytest.mark.parametrize(
    ("advantage", "ratio", "value", "slope"),
    [
        (1.0, 1.5, -1.2, 0.0),  # gains end at 1 + ε
        (1.0, 0.5, -0.5, -0.5),
        (-1.0, 0.5, 0.8, 0.0),  # and at 1 - ε
        (-1.0, 1.5, 1.5, 1.5),  # losses do not
        (2.0, 1.1, -2.2, -2.2),
    ],
)
def test_ppo_clipping(advantage: float, ratio: float, value: float, slope: float) -> None:
    log_q = -1.0
    found = _one(log_q, -2.0, log_q - math.log(ratio), advantage, clip_epsilon=0.2)
    assert found == pytest.approx((value, slope))
    free = _one(log_q, -2.0, log_q - math.log(ratio), advantage)
    assert free == pytest.approx((-advantage * ratio, -advantage * ratio))


def test_without_importance_a_token_counts_alike_whoever_drew_it() -> None:
    for drawn in (-0.1, -3.0):
        assert _one(-1.0, -2.0, drawn, 0.7, importance=False) == pytest.approx((0.7, -0.7))
        assert _one(-1.0, -2.0, drawn, 0.7, importance=False, estimator="k2") == pytest.approx((0.5, 1.0))


@pytest.mark.parametrize("gap", [-3.0, -0.2, 0.0, 1e-6, 0.9, 5.0])
def test_k2_and_k3_by_hand_under_a_weight_that_is_held_fixed(gap: float) -> None:
    """Weight 2, ℓ = log q - log p: values 2·ℓ²/2 and 2·(e^-ℓ - 1 + ℓ), slopes 2·ℓ and 2·(1 - e^-ℓ)."""
    log_q, drawn = -1.0, -1.0 - math.log(2)
    assert _one(log_q, log_q - gap, drawn, 0.0, estimator="k2") == pytest.approx((gap**2, 2 * gap))
    k3 = _one(log_q, log_q - gap, drawn, 0.0, estimator="k3")
    assert k3 == pytest.approx((2 * (math.expm1(-gap) + gap), -2 * math.expm1(-gap)), abs=1e-15)


def test_estimators_estimate_the_reverse_kl() -> None:
    """E_q[k3] = KL(q‖p) exactly, E_q[k2] nearly where the two are close: the names are the usual ones."""
    log_q = torch.tensor(log_probs([0.3, -0.2, 0.5]), dtype=FLOAT64)
    log_p = torch.tensor(log_probs([0.35, -0.25, 0.48]), dtype=FLOAT64)
    wanted = (log_q.exp() * (log_q - log_p)).sum().item()
    for estimator, close in (("k3", 1e-12), ("k2", 0.05)):
        config = OPDConfig(estimator=estimator, importance=False)
        signals = {
            Signal.STUDENT_LOGITS: log_q.expand(3, 3),
            Signal.TARGETS: torch.arange(3),
            Signal.TEACHER_LOGPS: log_p,
        }
        values = OPDLoss(config)(RolloutInputs(signals))
        assert (values * log_q.exp()).sum().item() == pytest.approx(wanted, rel=close)


def test_k3_far_above_the_student_is_a_line_and_finite() -> None:
    """log p - log q = 30 and 31 in float32: the slope stays that at 20, and points up."""
    config = OPDConfig(estimator="k3", importance=False)
    log_q = torch.tensor([[-30.0, 0.0], [-31.0, 0.0], [-1e4, 0.0]], requires_grad=True)
    signals = {
        Signal.STUDENT_LOGITS: log_q,
        Signal.TARGETS: torch.zeros(3, dtype=torch.long),
        Signal.TEACHER_LOGPS: torch.zeros(3),
    }
    values = OPDLoss(config)(RolloutInputs(signals))
    values.sum().backward()
    assert values.isfinite().all()
    assert (values[1] - values[0]).item() == pytest.approx(math.exp(20), rel=1e-4)
    assert log_q.grad is not None
    assert log_q.grad[:, 0].tolist() == pytest.approx([-math.exp(20)] * 3, rel=1e-4)


@pytest.mark.parametrize("settings", [{}, {"discount": 1.0}, {"estimator": "k2"}, {"estimator": "k3"}], ids=str)
def test_nothing_to_learn_where_student_and_teacher_agree(settings: dict[str, Any]) -> None:
    logits = randn(4, 3, seed=8).requires_grad_()
    targets = torch.tensor([0, 2, 1, 1])
    logps = logits.detach().log_softmax(-1)[torch.arange(4), targets]
    loss = OPDLoss(OPDConfig(**settings))
    worth = loss.advantages(Rollout(logps, logps, logps, torch.zeros(4, dtype=torch.long)))
    signals = {
        Signal.STUDENT_LOGITS: logits,
        Signal.TARGETS: targets,
        Signal.ADVANTAGES: worth,
        Signal.ROLLOUT_LOGPS: logps,
        Signal.BEHAVIOUR_LOGPS: logps,
        Signal.TEACHER_LOGPS: logps,
    }
    values = loss(RolloutInputs(signals))
    values.sum().backward()
    assert values.abs().max().item() < 1e-12
    assert logits.grad is not None
    assert logits.grad.abs().max().item() < 1e-12


def test_reads_what_its_settings_need() -> None:
    drawn = {Signal.STUDENT_LOGITS, Signal.TARGETS, Signal.TEACHER_LOGPS}
    reward = {Signal.ADVANTAGES, Signal.ROLLOUT_LOGPS}
    assert SPEC.signals() == drawn | reward | {Signal.BEHAVIOUR_LOGPS}
    assert SPEC.signals(OPDConfig(importance=False)) == drawn | reward
    assert SPEC.signals(OPDConfig(estimator="k3")) == drawn | {Signal.BEHAVIOUR_LOGPS}
    assert SPEC.needs() is TeacherAccess.TOKEN_LOGPS
    assert SPEC.accepts == {Text.STUDENT}


def test_the_card_says_which_gradient_is_right() -> None:
    assert "k3: the forward KL(p‖q)" in SPEC.card.notes
    assert "k1 as a plain loss has gradient 0" in SPEC.card.notes


@pytest.mark.parametrize(
    "wrong",
    [
        {"estimator": "k4"},
        {"discount": -0.1},
        {"discount": 1.1},
        {"reward_clip": 0},
        {"clip_epsilon": 0},
        {"clip_epsilon": 1},
    ],
    ids=str,
)
def test_bounds(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="Input should be"):
        OPDConfig(**wrong)


@pytest.mark.parametrize("wrong", [{"discount": 0.5}, {"reward_clip": 5.0}, {"clip_epsilon": 0.2}], ids=str)
def test_settings_of_the_policy_gradient_are_refused_elsewhere(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="apply to the policy gradient"):
        OPDConfig(estimator="k2", **wrong)


def test_a_clip_without_a_ratio_is_refused() -> None:
    with pytest.raises(ValueError, match="importance=false"):
        OPDConfig(importance=False, clip_epsilon=0.2)
