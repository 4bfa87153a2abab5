"""`dpkd-simpo`: rewards per token, without a reference, with a margin."""

from __future__ import annotations

import math

import pytest
from dpkd_zoo.dpkd_simpo import SPEC, DPKDSimPOConfig, DPKDSimPOLoss
from oracles import minus_log_sigmoid, sigmoid
from zoo_inputs import pair_inputs, random_pairs

from dpkd.api import TeacherAccess


def test_equals_loops() -> None:
    (q_t, q_s), (n_t, n_s), _ = random_pairs(5, seed=1)
    expected = [
        minus_log_sigmoid(1.5 / n_t[i].item() * q_t[i].item() - 1.5 / n_s[i].item() * q_s[i].item() - 0.4)
        for i in range(5)
    ]
    loss = DPKDSimPOLoss(DPKDSimPOConfig(beta=1.5, gamma=0.4))
    assert loss(pair_inputs((q_t, q_s), (n_t, n_s))).tolist() == pytest.approx(expected, abs=1e-12)


def test_margin_is_outside_beta_and_lengths_inside() -> None:
    """β = 2, log-probs per token -1 and -1.5: 2 · 0.5 - γ, which is 0 for the default γ = 1."""
    x = pair_inputs(([-3.0], [-3.0]), ([3.0], [2.0]))
    assert DPKDSimPOLoss(DPKDSimPOConfig())(x).item() == pytest.approx(math.log(2))
    assert DPKDSimPOLoss(DPKDSimPOConfig(gamma=0))(x).item() == pytest.approx(math.log1p(math.exp(-1)))


def test_gradient_closed_form() -> None:
    (q_t, q_s), (n_t, n_s), _ = random_pairs(5, seed=2)
    q_t.requires_grad_()
    q_s.requires_grad_()
    DPKDSimPOLoss(DPKDSimPOConfig())(pair_inputs((q_t, q_s), (n_t, n_s))).sum().backward()
    assert q_t.grad is not None
    assert q_s.grad is not None
    for i in range(5):
        weight = 2 * sigmoid(1 - 2 * (q_t[i].item() / n_t[i].item() - q_s[i].item() / n_s[i].item()))
        assert q_t.grad[i].item() == pytest.approx(-weight / n_t[i].item())
        assert q_s.grad[i].item() == pytest.approx(weight / n_s[i].item())


def test_needs_no_log_probs_of_the_teacher() -> None:
    assert SPEC.needs() is TeacherAccess.NONE
