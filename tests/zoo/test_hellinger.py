"""`hellinger`: a hand-made case, its bound, its gradient, its place in the α-β family."""

from __future__ import annotations

import math

import pytest
import torch
from dpkd_zoo.alpha_beta import AlphaBetaConfig, AlphaBetaLoss
from dpkd_zoo.hellinger import SPEC, HellingerConfig, HellingerLoss
from oracles_token import hellinger, reference
from token_helpers import gradient, logs, through_softmax, value
from zoo_inputs import randn

from dpkd.testing import check_loss

LOSS = HellingerLoss(HellingerConfig())
STUDENT, TEACHER = randn(4, 6, seed=1), randn(4, 6, seed=2)


@pytest.mark.parametrize("settings", [{}, {"temperature": 3.0}])
def test_conforms_and_equals_loops(settings: dict[str, float]) -> None:
    check_loss(SPEC, config=settings, reference=reference(hellinger))


def test_by_hand() -> None:
    assert value(LOSS, logs([0.5, 0.5]), logs([1.0, 0.0])).item() == pytest.approx(1 - math.sqrt(0.5))
    assert value(LOSS, logs([0.0, 1.0]), logs([1.0, 0.0])).item() == pytest.approx(1.0)
    assert gradient(LOSS, logs([0.0, 1.0]), logs([1.0, 0.0])).isfinite().all()


def test_gradient() -> None:
    """dL/dq = -½ √(p/q)."""
    p, q = TEACHER.softmax(-1), STUDENT.softmax(-1)
    torch.testing.assert_close(gradient(LOSS, STUDENT, TEACHER), through_softmax(q, -0.5 * (p / q).sqrt()))


def test_is_a_quarter_of_abkd_at_one_half() -> None:
    abkd = AlphaBetaLoss(AlphaBetaConfig(alpha=0.5, beta=0.5))
    torch.testing.assert_close(4 * value(LOSS, STUDENT, TEACHER), value(abkd, STUDENT, TEACHER))


def test_close_models_differ_by_a_quarter_of_the_kl_in_float32_too() -> None:
    """H² ≈ KL/4 to second order: 1 - Σ√(pq) would be rounding here."""
    teacher = randn(4, 6, seed=3)
    student = teacher + 1e-3 * randn(4, 6, seed=4)
    log_p, log_q = teacher.log_softmax(-1), student.log_softmax(-1)
    expected = (log_p.exp() * (log_p - log_q)).sum(-1) / 4
    found = value(LOSS, student.float(), teacher.float())
    torch.testing.assert_close(found.double(), expected, rtol=1e-2, atol=0)
