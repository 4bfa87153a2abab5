"""`dpkd`: Eq. 8 and 9, and the gradient whose sign Eq. 11 prints the wrong way round."""

from __future__ import annotations

import math

import pytest
import torch
from dpkd_zoo.dpkd import SPEC, DPKDConfig, DPKDLoss
from oracles import minus_log_sigmoid, sigmoid
from zoo_inputs import pair_inputs, random_pairs


def _margins(aggregation: str, beta: float, seed: int) -> tuple[list[float], tuple]:  # type: ignore[type-arg]
    (q_t, q_s), (n_t, n_s), (p_t, p_s) = random_pairs(6, seed)
    margins = []
    for i in range(6):
        by_t, by_s = (n_t[i].item(), n_s[i].item()) if aggregation == "mean" else (1.0, 1.0)
        reward_t = beta / by_t * (q_t[i].item() - p_t[i].item())
        reward_s = beta / by_s * (q_s[i].item() - p_s[i].item())
        margins.append(reward_t - reward_s)
    return margins, ((q_t, q_s), (n_t, n_s), (p_t, p_s))


@pytest.mark.parametrize("aggregation", ["sum", "mean"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_equals_loops(aggregation: str, smoothing: float) -> None:
    margins, inputs = _margins(aggregation, 0.7, seed=1)
    expected = [(1 - smoothing) * minus_log_sigmoid(m) + smoothing * minus_log_sigmoid(-m) for m in margins]
    loss = DPKDLoss(DPKDConfig(beta=0.7, aggregation=aggregation, label_smoothing=smoothing))
    assert loss(pair_inputs(*inputs)).tolist() == pytest.approx(expected, abs=1e-12)


def test_lengths_divide_inside_the_sigmoid() -> None:
    """β = 1, log q/p = -4 over 2 tokens and -9 over 3: margin 1 per token, 5 as a sum."""
    x = pair_inputs(([-6.0], [-10.0]), ([2.0], [3.0]), ([-2.0], [-1.0]))
    mean, total = DPKDLoss(DPKDConfig(beta=1)), DPKDLoss(DPKDConfig(beta=1, aggregation="sum"))
    assert mean(x).item() == pytest.approx(math.log1p(math.exp(-1)))
    assert total(x).item() == pytest.approx(math.log1p(math.exp(-5)))


@pytest.mark.parametrize("aggregation", ["sum", "mean"])
def test_gradient_closed_form(aggregation: str) -> None:
    """-β σ(r̂_s - r̂_t) [1/|y_t| for log q(y_t), -1/|y_s| for log q(y_s)]."""
    margins, ((q_t, q_s), (n_t, n_s), teacher) = _margins(aggregation, 0.7, seed=2)
    q_t.requires_grad_()
    q_s.requires_grad_()
    loss = DPKDLoss(DPKDConfig(beta=0.7, aggregation=aggregation))
    loss(pair_inputs((q_t, q_s), (n_t, n_s), teacher)).sum().backward()
    for i, margin in enumerate(margins):
        by_t, by_s = (n_t[i].item(), n_s[i].item()) if aggregation == "mean" else (1.0, 1.0)
        assert q_t.grad is not None
        assert q_s.grad is not None
        assert q_t.grad[i].item() == pytest.approx(-0.7 / by_t * sigmoid(-margin))
        assert q_s.grad[i].item() == pytest.approx(0.7 / by_s * sigmoid(-margin))


def test_weight_is_large_where_the_student_prefers_its_own() -> None:
    """At r̂_t - r̂_s = -2 the weight is σ(2) = 0.881; Eq. 11 as printed has σ(-2) = 0.119.

    Who is right is asked of finite differences of Eq. 8 in plain floats: -log σ(log q(y_t)/p(y_t) - 0).
    """
    step = 1e-6
    slope = (minus_log_sigmoid(-2 + step) - minus_log_sigmoid(-2 - step)) / (2 * step)
    right, printed = -sigmoid(2), -sigmoid(-2)
    assert (right, printed) == pytest.approx((-0.881, -0.119), abs=5e-4)
    assert slope == pytest.approx(right, abs=1e-6)
    assert slope != pytest.approx(printed, abs=0.5)
    q_t = torch.tensor([-3.0], dtype=torch.float64, requires_grad=True)
    loss = DPKDLoss(DPKDConfig(beta=1, aggregation="sum"))
    loss(pair_inputs((q_t, [-1.0]), ([1.0], [1.0]), ([-1.0], [-1.0]))).sum().backward()
    assert q_t.grad is not None
    assert q_t.grad.item() == pytest.approx(right)


@pytest.mark.parametrize("aggregation", ["sum", "mean"])
def test_gradcheck(aggregation: str) -> None:
    (q_t, q_s), lengths, teacher = random_pairs(4, seed=3)
    loss = DPKDLoss(DPKDConfig(aggregation=aggregation, label_smoothing=0.1))
    assert torch.autograd.gradcheck(
        lambda a, b: loss(pair_inputs((a, b), lengths, teacher)), (q_t.requires_grad_(), q_s.requires_grad_())
    )


def test_is_log_two_at_match() -> None:
    student, lengths, _ = random_pairs(3, seed=4)
    assert DPKDLoss(DPKDConfig())(pair_inputs(student, lengths, student)).tolist() == pytest.approx([math.log(2)] * 3)


def test_suggests_the_pairs_of_algorithm_1_and_an_lm_term() -> None:
    text = SPEC.suggests["text"]
    assert (text["source"], text["chosen"], text["rejected"]) == ("pairs", "teacher", "student")
    assert SPEC.suggests["text"]["refresh"] == "every_step"
    assert SPEC.suggests["terms"]["lm"]["weight"] > 0
    assert "pretrain" in SPEC.card.notes
