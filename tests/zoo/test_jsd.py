"""`jsd`: the mixture, both limits, TRL's ends, bounds."""

from __future__ import annotations

import math

import pytest
import torch
from dpkd_zoo.jsd import SPEC, JSDConfig, JSDLoss
from oracles_token import jsd, reference
from token_helpers import gradient, logs, through_softmax, value
from zoo_inputs import randn

from dpkd.functional import kl
from dpkd.testing import check_loss

STUDENT, TEACHER = randn(4, 6, seed=1), randn(4, 6, seed=2)
LOG_P, LOG_Q = TEACHER.log_softmax(-1), STUDENT.log_softmax(-1)


def _jsd(**settings: float) -> JSDLoss:
    return JSDLoss(JSDConfig(**settings))


@pytest.mark.parametrize(
    "settings", [{}, {"beta": 0.1}, {"beta": 0.9, "temperature": 2.0}, {"beta": 0}, {"beta": 1}, {"rescale": True}]
)
def test_conforms_and_equals_loops(settings: dict[str, float]) -> None:
    check_loss(SPEC, config=settings, reference=reference(jsd))


def test_beta_is_the_teachers_share() -> None:
    """p and q apart: KL(p‖βp) = -log β, KL(q‖(1-β)q) = -log(1-β), so the value is the entropy of the coin (β, 1-β)."""
    p, q = logs([1.0, 0.0]), logs([0.0, 1.0])
    for beta in (0.1, 0.5, 0.8):
        expected = -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)
        assert value(_jsd(beta=beta), q, p).item() == pytest.approx(expected)
    lopsided = value(_jsd(beta=0.1), logs([0.5, 0.5]), p).item()
    assert lopsided == pytest.approx(
        0.1 * math.log(1 / 0.55) + 0.9 * (0.5 * math.log(0.5 / 0.55) + 0.5 * math.log(0.5 / 0.45))
    )


@pytest.mark.parametrize("beta", [1e-3, 1e-5])
def test_limits_are_forward_and_reverse_kl(beta: float) -> None:
    forward, reverse = kl(LOG_P, LOG_Q), kl(LOG_Q, LOG_P)
    close = {"atol": 30 * beta, "rtol": 30 * beta}
    torch.testing.assert_close(value(_jsd(beta=beta), STUDENT, TEACHER) / beta, forward, **close)
    torch.testing.assert_close(value(_jsd(beta=1 - beta), STUDENT, TEACHER) / beta, reverse, **close)
    torch.testing.assert_close(value(_jsd(beta=beta, rescale=True), STUDENT, TEACHER), forward, **close)
    torch.testing.assert_close(value(_jsd(beta=1 - beta, rescale=True), STUDENT, TEACHER), reverse, **close)


def test_at_the_ends_it_is_the_kl_itself_as_in_trl() -> None:
    for rescale in (False, True):
        torch.testing.assert_close(value(_jsd(beta=0, rescale=rescale), STUDENT, TEACHER), kl(LOG_P, LOG_Q))
        torch.testing.assert_close(value(_jsd(beta=1, rescale=rescale), STUDENT, TEACHER), kl(LOG_Q, LOG_P))


def test_swapping_the_models_swaps_beta() -> None:
    torch.testing.assert_close(
        value(_jsd(beta=0.2), STUDENT, TEACHER), value(_jsd(beta=0.8), TEACHER, STUDENT), atol=1e-12, rtol=0
    )


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_gradient(beta: float) -> None:
    """dL/dq = (1-β) log(q/m), up to a constant."""
    p, q = LOG_P.exp(), LOG_Q.exp()
    slope = (1 - beta) * (q / (beta * p + (1 - beta) * q)).log()
    torch.testing.assert_close(gradient(_jsd(beta=beta), STUDENT, TEACHER), through_softmax(q, slope))


def test_an_excluded_token_has_a_finite_price() -> None:
    p, q = logs([0.5, 0.5, 0.0]), logs([0.5, 0.0, 0.5])
    assert value(_jsd(), q, p).item() == pytest.approx(0.5 * math.log(2))
    assert gradient(_jsd(), q, p).isfinite().all()
