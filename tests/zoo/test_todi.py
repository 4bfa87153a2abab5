"""`todi`: the weight of each token, its limits, and no gradient through it."""

from __future__ import annotations

import math

import pytest
import torch
from dpkd_zoo.symmetric_kl import SymmetricKLConfig, SymmetricKLLoss
from dpkd_zoo.todi import SPEC, ToDiConfig, ToDiLoss
from oracles_token import reference, todi
from token_helpers import gradient, logs, through_softmax, value
from zoo_inputs import randn

from dpkd.testing import check_loss

STUDENT, TEACHER = randn(4, 6, seed=1), randn(4, 6, seed=2)
P, Q = TEACHER.softmax(-1), STUDENT.softmax(-1)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0, 4.0])
def test_conforms_and_equals_loops(beta: float) -> None:
    check_loss(SPEC, config={"beta": beta}, reference=reference(todi))


def test_at_beta_1_the_weight_is_the_teachers_share() -> None:
    """σ(log p/q) = p/(p+q), hence Σ log(p/q) (p² - q²)/(p+q) = Σ (p - q) log(p/q)."""
    found = value(ToDiLoss(ToDiConfig()), STUDENT, TEACHER)
    torch.testing.assert_close(found, ((P - Q) * (P / Q).log()).sum(-1))


def test_without_slope_it_is_half_forward_half_reverse() -> None:
    loss, half = ToDiLoss(ToDiConfig(beta=0)), SymmetricKLLoss(SymmetricKLConfig())
    torch.testing.assert_close(value(loss, STUDENT, TEACHER), value(half, STUDENT, TEACHER))
    torch.testing.assert_close(gradient(loss, STUDENT, TEACHER), gradient(half, STUDENT, TEACHER))


def test_with_a_steep_slope_a_low_token_has_the_forward_summand_and_a_high_one_the_reverse() -> None:
    """p = .6 .3 .1, q = .3 .3 .4."""
    found = value(ToDiLoss(ToDiConfig(beta=500)), logs([0.3, 0.3, 0.4]), logs([0.6, 0.3, 0.1])).item()
    assert found == pytest.approx(0.6 * math.log(2) + 0.4 * math.log(4))


@pytest.mark.parametrize("beta", [0.5, 1.0])
def test_gradient_takes_the_weights_as_given(beta: float) -> None:
    """dL/dq = -s p/q + (1-s) (log(q/p) + 1)."""
    s = P**beta / (P**beta + Q**beta)
    slope = -s * P / Q + (1 - s) * ((Q / P).log() + 1)
    torch.testing.assert_close(gradient(ToDiLoss(ToDiConfig(beta=beta)), STUDENT, TEACHER), through_softmax(Q, slope))


def test_a_token_that_one_model_excludes_gives_infinity() -> None:
    loss = ToDiLoss(ToDiConfig())
    p, q = logs([0.5, 0.5, 0.0]), logs([0.25, 0.5, 0.25])
    assert value(loss, q, p).item() == math.inf
    assert value(loss, p, q).item() == math.inf


def test_a_probability_that_rounds_to_0_meets_no_infinity() -> None:
    student, teacher = torch.tensor([[0.0, -math.inf]]), torch.tensor([[0.0, -200.0]])
    assert value(ToDiLoss(ToDiConfig()), student, teacher).item() == 0
    assert value(ToDiLoss(ToDiConfig()), teacher, student).item() == 0
