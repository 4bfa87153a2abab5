"""`symmetric-kl`: the two directions, their weights, and no 0 · inf at the ends."""

from __future__ import annotations

import math

import pytest
import torch
from dpkd_zoo.symmetric_kl import SPEC, SymmetricKLConfig, SymmetricKLLoss
from oracles_token import reference, symmetric_kl
from token_helpers import gradient, logs, through_softmax, value
from zoo_inputs import randn

from dpkd.testing import check_loss

STUDENT, TEACHER = randn(4, 6, seed=1), randn(4, 6, seed=2)


def _loss(weight: float) -> SymmetricKLLoss:
    return SymmetricKLLoss(SymmetricKLConfig(reverse_weight=weight))


@pytest.mark.parametrize(
    "settings", [{}, {"reverse_weight": 0}, {"reverse_weight": 1}, {"reverse_weight": 0.2, "temperature": 2.0}]
)
def test_conforms_and_equals_loops(settings: dict[str, float]) -> None:
    check_loss(SPEC, config=settings, reference=reference(symmetric_kl))


def test_the_ends_are_the_two_kls() -> None:
    """p = ½ ½ 0, q = ¼ ½ ¼: KL(p‖q) = ½ log 2, and KL(q‖p) is infinite, with no NaN where it has no weight."""
    p, q = logs([0.5, 0.5, 0.0]), logs([0.25, 0.5, 0.25])
    assert value(_loss(0), q, p).item() == pytest.approx(0.5 * math.log(2))
    assert value(_loss(1), q, p).item() == math.inf
    assert value(_loss(1), p, q).item() == pytest.approx(0.5 * math.log(2))
    assert value(_loss(0.01), q, p).item() == math.inf


def test_half_and_half_is_symmetric() -> None:
    torch.testing.assert_close(value(_loss(0.5), STUDENT, TEACHER), value(_loss(0.5), TEACHER, STUDENT))


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_gradient(weight: float) -> None:
    p, q = TEACHER.softmax(-1), STUDENT.softmax(-1)
    expected = (1 - weight) * (q - p) + weight * through_softmax(q, (q / p).log())
    torch.testing.assert_close(gradient(_loss(weight), STUDENT, TEACHER), expected)
