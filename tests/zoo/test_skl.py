"""`skl`: which model is mixed in, the bound, the limit."""

from __future__ import annotations

import math

import pytest
import torch
from dpkd_zoo.skl import SPEC, SKLConfig, SKLLoss
from oracles_token import reference, skl
from token_helpers import gradient, logs, through_softmax, value
from zoo_inputs import randn

from dpkd.functional import kl
from dpkd.testing import check_loss

STUDENT, TEACHER = randn(4, 6, seed=1), randn(4, 6, seed=2)


@pytest.mark.parametrize("skew", [0.0, 0.1, 0.5])
def test_conforms_and_equals_loops(skew: float) -> None:
    check_loss(SPEC, config={"skew": skew}, reference=reference(skl))


def test_the_teacher_is_mixed_in_with_the_small_weight() -> None:
    """Apart, the value is -log α: finite, and the largest there is."""
    p, q = logs([1.0, 0.0]), logs([0.0, 1.0])
    assert value(SKLLoss(SKLConfig()), q, p).item() == pytest.approx(-math.log(0.1))
    assert gradient(SKLLoss(SKLConfig()), q, p).isfinite().all()


def test_without_skew_it_is_forward_kl() -> None:
    found = value(SKLLoss(SKLConfig(skew=0)), STUDENT, TEACHER)
    torch.testing.assert_close(found, kl(TEACHER.log_softmax(-1), STUDENT.log_softmax(-1)))


@pytest.mark.parametrize("skew", [0.1, 0.6])
def test_gradient(skew: float) -> None:
    """dL/dq = -(1-α) p/m."""
    p, q = TEACHER.softmax(-1), STUDENT.softmax(-1)
    slope = -(1 - skew) * p / (skew * p + (1 - skew) * q)
    torch.testing.assert_close(gradient(SKLLoss(SKLConfig(skew=skew)), STUDENT, TEACHER), through_softmax(q, slope))
