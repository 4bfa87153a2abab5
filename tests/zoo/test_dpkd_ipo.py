"""`dpkd-ipo`: (h - 1/(2τ))² and its gradient."""

from __future__ import annotations

import pytest
import torch
from dpkd_zoo.dpkd_ipo import DPKDIPOConfig, DPKDIPOLoss
from zoo_inputs import pair_inputs, random_pairs


def _margin(inputs: tuple, i: int, aggregation: str) -> float:  # type: ignore[type-arg]
    (q_t, q_s), (n_t, n_s), (p_t, p_s) = inputs
    by_t, by_s = (n_t[i].item(), n_s[i].item()) if aggregation == "mean" else (1.0, 1.0)
    return float((q_t[i] - p_t[i]).item() / by_t - (q_s[i] - p_s[i]).item() / by_s)


@pytest.mark.parametrize("aggregation", ["sum", "mean"])
def test_equals_loops(aggregation: str) -> None:
    inputs = random_pairs(5, seed=1)
    expected = [(_margin(inputs, i, aggregation) - 1 / (2 * 0.25)) ** 2 for i in range(5)]
    loss = DPKDIPOLoss(DPKDIPOConfig(tau=0.25, aggregation=aggregation))
    assert loss(pair_inputs(*inputs)).tolist() == pytest.approx(expected, abs=1e-12)


def test_is_zero_at_the_margin_and_symmetric_around_it() -> None:
    """τ = 0.1: the margin aimed at is 5 nats; 4 and 6 cost 1."""
    x = pair_inputs(([-1.0, -1.0, -1.0], [-6.0, -5.0, -7.0]), ([9.0] * 3, [4.0] * 3), ([-1.0] * 3, [-1.0] * 3))
    assert DPKDIPOLoss(DPKDIPOConfig())(x).tolist() == pytest.approx([0, 1, 1])


def test_at_match_it_is_the_squared_margin() -> None:
    student, lengths, _ = random_pairs(3, seed=2)
    assert DPKDIPOLoss(DPKDIPOConfig())(pair_inputs(student, lengths, student)).tolist() == pytest.approx([25] * 3)


@pytest.mark.parametrize("aggregation", ["sum", "mean"])
def test_gradient_closed_form(aggregation: str) -> None:
    """2 (h - 1/(2τ)) / |y_t| for log q(y_t), the negative with |y_s| for log q(y_s)."""
    (q_t, q_s), (n_t, n_s), teacher = inputs = random_pairs(5, seed=3)
    margins = [_margin(inputs, i, aggregation) for i in range(5)]
    q_t.requires_grad_()
    q_s.requires_grad_()
    loss = DPKDIPOLoss(DPKDIPOConfig(aggregation=aggregation))
    loss(pair_inputs((q_t, q_s), (n_t, n_s), teacher)).sum().backward()
    slope = torch.tensor([2 * (m - 5) for m in margins], dtype=torch.float64)
    by_t, by_s = (n_t, n_s) if aggregation == "mean" else (1.0, 1.0)
    torch.testing.assert_close(q_t.grad, slope / by_t)
    torch.testing.assert_close(q_s.grad, -slope / by_s)
