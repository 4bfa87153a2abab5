"""`alpha-beta`: the formula, its limits where α, β or α+β is 0, and the divergences that it contains."""

from __future__ import annotations

import math

import pytest
import torch
from dpkd_zoo.alpha_beta import SPEC, AlphaBetaConfig, AlphaBetaLoss
from oracles_token import alpha_beta, reference
from pydantic import ValidationError
from token_helpers import gradient, logs, out, through_softmax, value
from zoo_inputs import randn

from dpkd.functional import kl
from dpkd.testing import check_loss

STUDENT, TEACHER = randn(4, 6, seed=1, scale=1.5), randn(4, 6, seed=2, scale=1.5)
LOG_P, LOG_Q = TEACHER.log_softmax(-1), STUDENT.log_softmax(-1)
P, Q = LOG_P.exp(), LOG_Q.exp()


def _loss(alpha: float, beta: float) -> AlphaBetaLoss:
    return AlphaBetaLoss(AlphaBetaConfig(alpha=alpha, beta=beta))


@pytest.mark.parametrize(
    ("alpha", "beta"), [(0.2, 0.7), (0.5, 0.5), (1, 1), (1.5, 0.25), (1, 0), (0.4, 0), (0, 1), (0, 0.4), (0, 0)]
)
def test_conforms_and_equals_loops(alpha: float, beta: float) -> None:
    check_loss(SPEC, config={"alpha": alpha, "beta": beta}, reference=reference(alpha_beta))


# Powers of a probability near 0 pass float32's largest number: infinite on the kit's extreme logits, as they should be.
@pytest.mark.parametrize(("alpha", "beta"), [(-0.3, 1), (1, -0.3), (0.5, -0.5), (-0.5, 0.5)])
def test_negative_exponents_conform_but_for_extreme_logits(alpha: float, beta: float) -> None:
    check_loss(
        SPEC,
        config={"alpha": alpha, "beta": beta},
        reference=reference(alpha_beta),
        expected_failures={"finite_on_extreme_logits": "p^-0.3 of an impossible token is infinite"},
    )


@pytest.mark.parametrize("step", [1e-2, 2e-3])
@pytest.mark.parametrize(
    ("limit", "direction"),
    [
        ((1, 0), (0, 1)),
        ((0.4, 0), (0, 1)),
        ((0, 1), (1, 0)),
        ((0, 0.4), (1, 0)),
        ((0.5, -0.5), (0, 1)),
        ((-0.5, 0.5), (1, 0)),
        ((0, 0), (1, 1)),
    ],
)
def test_continuous_at_the_limits(limit: tuple[float, float], direction: tuple[int, int], step: float) -> None:
    """Close to a limit the general formula is as close to it as the step is small."""
    near = [a + step * d for a, d in zip(limit, direction, strict=True)]
    for what in (value, gradient):
        torch.testing.assert_close(
            what(_loss(*near), STUDENT, TEACHER), what(_loss(*limit), STUDENT, TEACHER), rtol=8 * step, atol=8 * step
        )


@pytest.mark.parametrize(("alpha", "beta"), [(0.5, 9e-4), (9e-4, 0.5), (0.5, -0.4995), (9e-4, -9e-4)])
def test_within_a_thousandth_of_a_limit_it_is_the_limit(alpha: float, beta: float) -> None:
    at_limit = [0.0 if abs(e) < 1e-3 else e for e in (alpha, beta)]
    if abs(alpha + beta) < 1e-3 and at_limit != [0, 0]:
        at_limit = [alpha, -alpha]
    assert torch.equal(value(_loss(alpha, beta), STUDENT, TEACHER), value(_loss(*at_limit), STUDENT, TEACHER))


def test_contains_the_two_kls_and_the_squared_distance() -> None:
    torch.testing.assert_close(value(_loss(1, 0), STUDENT, TEACHER), kl(LOG_P, LOG_Q))
    torch.testing.assert_close(value(_loss(0, 1), STUDENT, TEACHER), kl(LOG_Q, LOG_P))
    torch.testing.assert_close(value(_loss(1, 1), STUDENT, TEACHER), 0.5 * (P - Q).square().sum(-1))
    torch.testing.assert_close(value(_loss(0, 0), STUDENT, TEACHER), 0.5 * (LOG_P - LOG_Q).square().sum(-1))


def test_with_exponents_that_sum_to_1_it_is_the_alpha_divergence() -> None:
    """(1 - Σ p^α q^(1-α)) / (α(1-α))."""
    found = value(_loss(0.3, 0.7), STUDENT, TEACHER)
    torch.testing.assert_close(found, (1 - (P**0.3 * Q**0.7).sum(-1)) / 0.21)


@pytest.mark.parametrize(
    ("alpha", "beta"), [(0.2, 0.7), (1, 1), (-0.3, 1), (1, -0.3), (0.4, 0), (0.5, -0.5), (-0.5, 0.5)]
)
def test_gradient(alpha: float, beta: float) -> None:
    """dL/dq = 1/α q^(β-1) (q^α - p^α), at the limits in β and α+β too."""
    slope = Q ** (beta - 1) * (Q**alpha - P**alpha) / alpha
    torch.testing.assert_close(gradient(_loss(alpha, beta), STUDENT, TEACHER), through_softmax(Q, slope))


@pytest.mark.parametrize("beta", [1, 0.4, 0])
def test_gradient_without_alpha(beta: float) -> None:
    """The limit of it as α → 0: q^(β-1) log(q/p)."""
    slope = Q ** (beta - 1) * (Q / P).log()
    torch.testing.assert_close(gradient(_loss(0, beta), STUDENT, TEACHER), through_softmax(Q, slope))


@pytest.mark.parametrize(("alpha", "beta"), [(0.2, 0.7), (0.4, 0), (0, 0.4), (0, 0), (0.5, -0.5), (-0.3, 1), (1, -0.3)])
def test_a_token_that_both_exclude_counts_nothing(alpha: float, beta: float) -> None:
    loss, student, teacher = _loss(alpha, beta), out(STUDENT, 2, 5), out(TEACHER, 2, 5)
    kept = [0, 1, 3, 4]
    torch.testing.assert_close(value(loss, student, teacher), value(loss, student[:, kept], teacher[:, kept]))
    assert gradient(loss, student, teacher).isfinite().all()


def test_a_token_that_one_excludes_is_infinite_only_where_a_power_or_logarithm_is() -> None:
    p, q = logs([0.5, 0.5, 0.0]), logs([0.25, 0.5, 0.25])
    for exponents in [(0.2, 0.7), (0.4, 0), (1, -0.3)]:
        assert value(_loss(*exponents), q, p).isfinite().all()
    for exponents in [(0, 0.4), (0, 0), (0.5, -0.5), (-0.5, 0.5), (-0.3, 1)]:
        assert value(_loss(*exponents), q, p).item() == math.inf
    for exponents in [(0.4, 0), (0, 0), (0.5, -0.5), (-0.5, 0.5), (1, -0.3)]:
        assert value(_loss(*exponents), p, q).item() == math.inf


def test_close_models_in_float32() -> None:
    """Values of 1e-6 are not drowned in the rounding of their parts: all members are about ½ Σ p^(α+β) (log q/p)²."""
    student = TEACHER + 3e-3 * randn(4, 6, seed=3)
    gap = student.log_softmax(-1) - LOG_P
    for alpha, beta in [(0.2, 0.7), (0.5, 0.5), (1, 0), (0, 1)]:
        found = value(_loss(alpha, beta), student.float(), TEACHER.float()).double()
        torch.testing.assert_close(found, 0.5 * (P ** (alpha + beta) * gap**2).sum(-1), rtol=0.05, atol=5e-7)


def test_exponents_whose_sum_is_negative_are_refused() -> None:
    with pytest.raises(ValidationError, match=r"α\+β should be at least 0"):
        AlphaBetaConfig(alpha=-0.5, beta=0.2)
