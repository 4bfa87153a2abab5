"""`dpkd-cpo`: preference without a reference, plus the likelihood of the chosen response."""

from __future__ import annotations

import math

import pytest
import torch
from dpkd_zoo.dpkd_cpo import SPEC, DPKDCPOConfig, DPKDCPOLoss
from oracles import minus_log_sigmoid, sigmoid
from zoo_inputs import pair_inputs, random_pairs

from dpkd.api import TeacherAccess

WAYS = [("sum", "sum"), ("sum", "mean"), ("mean", "sum"), ("mean", "mean")]


def _divisors(lengths: tuple[torch.Tensor, torch.Tensor], how: str, i: int) -> tuple[float, float]:
    return (lengths[0][i].item(), lengths[1][i].item()) if how == "mean" else (1.0, 1.0)


@pytest.mark.parametrize(("preference", "likelihood"), WAYS)
def test_equals_loops(preference: str, likelihood: str) -> None:
    (q_t, q_s), lengths, _ = random_pairs(5, seed=1)
    expected = []
    for i in range(5):
        by_t, by_s = _divisors(lengths, preference, i)
        margin = 0.3 * (q_t[i].item() / by_t - q_s[i].item() / by_s)
        expected.append(minus_log_sigmoid(margin) - 0.5 * q_t[i].item() / _divisors(lengths, likelihood, i)[0])
    config = DPKDCPOConfig(beta=0.3, nll_weight=0.5, aggregation=preference, nll_aggregation=likelihood)
    assert DPKDCPOLoss(config)(pair_inputs((q_t, q_s), lengths)).tolist() == pytest.approx(expected, abs=1e-12)


def test_the_denominator_is_the_dispreferred_response() -> None:
    """As printed, q(y_t)/q(y_t), the value would not depend on y_s."""
    x = pair_inputs(([-2.0, -2.0], [-2.0, -12.0]), ([1.0, 1.0], [1.0, 1.0]))
    assert DPKDCPOLoss(DPKDCPOConfig())(x).tolist() == pytest.approx([math.log(2) + 2, math.log1p(math.exp(-1)) + 2])


@pytest.mark.parametrize(("preference", "likelihood"), WAYS)
def test_gradient_closed_form(preference: str, likelihood: str) -> None:
    (q_t, q_s), lengths, _ = random_pairs(5, seed=2)
    q_t.requires_grad_()
    q_s.requires_grad_()
    config = DPKDCPOConfig(beta=0.3, nll_weight=0.5, aggregation=preference, nll_aggregation=likelihood)
    DPKDCPOLoss(config)(pair_inputs((q_t, q_s), lengths)).sum().backward()
    assert q_t.grad is not None
    assert q_s.grad is not None
    for i in range(5):
        by_t, by_s = _divisors(lengths, preference, i)
        weight = 0.3 * sigmoid(-0.3 * (q_t[i].item() / by_t - q_s[i].item() / by_s))
        own = -weight / by_t - 0.5 / _divisors(lengths, likelihood, i)[0]
        assert q_t.grad[i].item() == pytest.approx(own)
        assert q_s.grad[i].item() == pytest.approx(weight / by_s)


def test_needs_no_log_probs_of_the_teacher() -> None:
    assert SPEC.needs() is TeacherAccess.NONE
