"""`tvd`: a hand-made case, its bound, its gradient, and the tie."""

from __future__ import annotations

import pytest
import torch
from dpkd_zoo.tvd import SPEC, TVDConfig, TVDLoss
from oracles_token import reference, tvd
from token_helpers import gradient, logs, through_softmax, value
from zoo_inputs import randn

from dpkd.testing import check_loss

LOSS = TVDLoss(TVDConfig())


@pytest.mark.parametrize("settings", [{}, {"temperature": 3.0}])
def test_conforms_and_equals_loops(settings: dict[str, float]) -> None:
    check_loss(SPEC, config=settings, reference=reference(tvd))


def test_by_hand() -> None:
    assert value(LOSS, logs([0.2, 0.3, 0.5]), logs([0.5, 0.1, 0.4])).item() == pytest.approx(0.3)


def test_apart_it_is_1_with_excluded_tokens_too() -> None:
    assert value(LOSS, logs([0.5, 0.5, 0.0]), logs([0.0, 0.0, 1.0])).item() == pytest.approx(1.0)
    assert gradient(LOSS, logs([0.5, 0.5, 0.0]), logs([0.0, 0.0, 1.0])).isfinite().all()


def test_symmetric() -> None:
    student, teacher = randn(4, 6, seed=1), randn(4, 6, seed=2)
    torch.testing.assert_close(value(LOSS, student, teacher), value(LOSS, teacher, student))


def test_gradient() -> None:
    """dL/dq = ½ sign(q - p)."""
    student, teacher = randn(4, 6, seed=1), randn(4, 6, seed=2)
    p, q = teacher.softmax(-1), student.softmax(-1)
    torch.testing.assert_close(gradient(LOSS, student, teacher), through_softmax(q, 0.5 * (q - p).sign()))


def test_where_p_is_q_the_gradient_of_the_token_is_0() -> None:
    """Token 0 agrees exactly; the slopes are 0, ½ and -½."""
    q, p = logs([0.5, 0.25, 0.25]), logs([0.5, 0.125, 0.375])
    expected = through_softmax(q.exp(), torch.tensor([[0.0, 0.5, -0.5]], dtype=torch.float64))
    torch.testing.assert_close(gradient(LOSS, q, p), expected)
