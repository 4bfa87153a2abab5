"""`dpkd-orpo`: odds of the mean log-probs, likelihood of y_t, and both ends of log(1 - P)."""

from __future__ import annotations

import math
from typing import Any

import oracles_pair
import pytest
import torch
from dpkd_zoo.dpkd_orpo import SPEC, DPKDORPOConfig, DPKDORPOLoss
from oracles_pair import sigma, softplus
from zoo_inputs import pair_inputs, random_pairs

from dpkd.api import TeacherAccess
from dpkd.testing import Outcome, check_loss


@pytest.mark.parametrize("settings", [{}, {"odds_weight": 2.0}], ids=str)
def test_conforms_and_equals_loops(settings: dict[str, Any]) -> None:
    report = check_loss(SPEC, config=settings, reference=oracles_pair.orpo)
    assert report.named(Outcome.WARNED) == ()


def test_odds_by_hand() -> None:
    """P = 3/4 and 1/3: odds 3 and 1/2, so that -log σ(log 6) = log(7/6); beside it -log(3/4)."""
    x = pair_inputs(([2 * math.log(3 / 4)], [5 * math.log(1 / 3)]), ([2.0], [5.0]))
    loss = DPKDORPOLoss(DPKDORPOConfig(odds_weight=0.5))
    assert loss(x).item() == pytest.approx(math.log(4 / 3) + 0.5 * math.log(7 / 6))
    assert x.parts["log_odds_ratio"].item() == pytest.approx(math.log(6))
    assert x.parts["log_likelihood"].item() == pytest.approx(math.log(3 / 4))


def test_unlikely_responses_are_compared_as_dpkd_cpo_does_per_token() -> None:
    """For P → 0 the odds are P: -log σ(log P_t - log P_s)."""
    x = pair_inputs(([-60.0], [-62.0]), ([2.0], [2.0]))
    assert DPKDORPOLoss(DPKDORPOConfig(odds_weight=1))(x).item() == pytest.approx(30 + softplus(-1), abs=1e-9)


def test_gradient_closed_form() -> None:
    """d log odds / d log P = 1/(1-P)."""
    (q_t, q_s), (n_t, n_s), _ = random_pairs(5, seed=2)
    q_t.requires_grad_()
    q_s.requires_grad_()
    DPKDORPOLoss(DPKDORPOConfig())(pair_inputs((q_t, q_s), (n_t, n_s))).sum().backward()
    assert q_t.grad is not None
    assert q_s.grad is not None
    for i in range(5):
        share_t, share_s = math.exp(q_t[i].item() / n_t[i].item()), math.exp(q_s[i].item() / n_s[i].item())
        odds_t, odds_s = share_t / (1 - share_t), share_s / (1 - share_s)
        weight = 0.1 * odds_s / (odds_s + odds_t)
        assert q_t.grad[i].item() == pytest.approx(-(1 + weight / (1 - share_t)) / n_t[i].item())
        assert q_s.grad[i].item() == pytest.approx(weight / (1 - share_s) / n_s[i].item())


@pytest.mark.parametrize("logp", [-1e-5, -1e-3, -0.5, -math.log(2), -0.7, -5.0, -80.0])
def test_log_of_rest_keeps_its_digits_in_float32(logp: float) -> None:
    """The odds against an even response, P = 1/2: their log is log P - log(1-P)."""
    x = pair_inputs((torch.tensor([logp]), torch.tensor([-math.log(2)])), (torch.tensor([1.0]), torch.tensor([1.0])))
    DPKDORPOLoss(DPKDORPOConfig())(x)
    expected = logp - math.log(-math.expm1(logp))
    assert x.parts["log_odds_ratio"].item() == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(("logp_t", "logp_s"), [(0.0, -1.0), (-1.0, 0.0), (0.0, 0.0)])
def test_a_certain_response_gives_finite_numbers(logp_t: float, logp_s: float) -> None:
    """P = 1 has infinite odds."""
    q_t, q_s = torch.tensor([logp_t], requires_grad=True), torch.tensor([logp_s], requires_grad=True)
    value = DPKDORPOLoss(DPKDORPOConfig())(pair_inputs((q_t, q_s), (torch.ones(1), torch.ones(1))))
    value.sum().backward()
    assert q_t.grad is not None
    assert q_s.grad is not None
    assert value.isfinite().all()
    assert q_t.grad.isfinite().all()
    assert q_s.grad.isfinite().all()
    assert q_s.grad.item() > 0
    assert sigma(q_s.grad.item()) > 0.5


def test_needs_no_log_probs_of_the_teacher_and_no_lm_term() -> None:
    assert SPEC.needs() is TeacherAccess.NONE
    assert "terms" not in SPEC.suggests


def test_bounds() -> None:
    with pytest.raises(ValueError, match="Input should be"):
        DPKDORPOConfig(odds_weight=0)
