"""`srkl`: which model is mixed in, the bound, the limit, and the gradient through both places of q."""

from __future__ import annotations

import math

import pytest
import torch
from dpkd_zoo.srkl import SPEC, SRKLConfig, SRKLLoss
from oracles_token import reference, srkl
from token_helpers import gradient, logs, through_softmax, value
from zoo_inputs import randn

from dpkd.functional import kl
from dpkd.testing import check_loss

STUDENT, TEACHER = randn(4, 6, seed=1), randn(4, 6, seed=2)


@pytest.mark.parametrize("skew", [0.0, 0.1, 0.5])
def test_conforms_and_equals_loops(skew: float) -> None:
    check_loss(SPEC, config={"skew": skew}, reference=reference(srkl))


def test_the_student_is_mixed_in_with_the_small_weight() -> None:
    """Apart, the value is -log α: finite, and the largest there is."""
    p, q = logs([1.0, 0.0]), logs([0.0, 1.0])
    assert value(SRKLLoss(SRKLConfig()), q, p).item() == pytest.approx(-math.log(0.1))


def test_a_token_that_the_teacher_excludes_has_a_finite_price() -> None:
    p, q = logs([0.5, 0.5, 0.0]), logs([0.25, 0.25, 0.5])
    expected = 0.5 * math.log(0.25 / (0.9 * 0.5 + 0.1 * 0.25)) + 0.5 * math.log(1 / 0.1)
    assert value(SRKLLoss(SRKLConfig()), q, p).item() == pytest.approx(expected)


def test_without_skew_it_is_reverse_kl() -> None:
    found = value(SRKLLoss(SRKLConfig(skew=0)), STUDENT, TEACHER)
    torch.testing.assert_close(found, kl(STUDENT.log_softmax(-1), TEACHER.log_softmax(-1)))


@pytest.mark.parametrize("skew", [0.1, 0.6])
def test_gradient(skew: float) -> None:
    """dL/dq = log(q/m) + 1 - α q/m; a detached mixture would lack the last part."""
    p, q = TEACHER.softmax(-1), STUDENT.softmax(-1)
    m = (1 - skew) * p + skew * q
    slope = (q / m).log() - skew * q / m
    torch.testing.assert_close(gradient(SRKLLoss(SRKLConfig(skew=skew)), STUDENT, TEACHER), through_softmax(q, slope))
