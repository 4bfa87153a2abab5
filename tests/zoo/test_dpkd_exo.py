"""`dpkd-exo`: a reverse KL of two coins, 0 at the label's own margin, bounded, with a gradient that dies far below."""

from __future__ import annotations

import math
from typing import Any

import oracles_pair
import pytest
import torch
from dpkd_zoo.dpkd_exo import SPEC, DPKDEXOConfig, DPKDEXOLoss
from oracles_pair import sigma
from scipy.special import rel_entr
from torch import Tensor
from zoo_inputs import pair_inputs

from dpkd.testing import Outcome, check_loss


@pytest.mark.parametrize("settings", [{}, {"label_smoothing": 0.3}, {"beta": 0.5, "aggregation": "mean"}], ids=str)
def test_conforms_and_equals_loops(settings: dict[str, Any]) -> None:
    report = check_loss(SPEC, config=settings, reference=oracles_pair.exo)
    assert report.named(Outcome.WARNED) == ()


def _at(margin: float | Tensor, smoothing: float = 1e-3) -> Tensor:
    q_t = margin - 3 if isinstance(margin, Tensor) else [margin - 3]
    x = pair_inputs((q_t, [-4.0]), ([2.0], [5.0]), ([-3.0], [-4.0]))
    return DPKDEXOLoss(DPKDEXOConfig(beta=1, label_smoothing=smoothing))(x)


@pytest.mark.parametrize("margin", [-4.0, 0.0, 1.5, 12.0])
@pytest.mark.parametrize("smoothing", [1e-3, 0.2])
def test_is_scipys_relative_entropy_of_the_two_coins(margin: float, smoothing: float) -> None:
    coin = sigma(margin)
    expected = rel_entr([coin, sigma(-margin)], [1 - smoothing, smoothing]).sum()
    assert _at(margin, smoothing).item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("smoothing", [1e-3, 0.2])
def test_rests_at_the_margin_of_the_label(smoothing: float) -> None:
    wanted = math.log((1 - smoothing) / smoothing)
    assert _at(wanted, smoothing).item() == pytest.approx(0, abs=1e-12)
    for side in (-0.5, 0.5):
        assert _at(wanted + side, smoothing).item() > 1e-6


def test_is_bounded_by_minus_log_epsilon() -> None:
    assert _at(-1e6).item() == pytest.approx(-math.log(1e-3))
    assert _at(1e6).item() == pytest.approx(-math.log(1 - 1e-3))


@pytest.mark.parametrize("margin", [-30.0, -2.0, 0.0, 6.0, 9.0])
def test_gradient_closed_form(margin: float) -> None:
    """σ(m) σ(-m) (m - log((1-ε)/ε)): it dies at -30, pulls up at 6 and down at 9."""
    m = torch.tensor([margin], dtype=torch.float64, requires_grad=True)
    _at(m).sum().backward()
    assert m.grad is not None
    expected = sigma(margin) * sigma(-margin) * (margin - math.log(0.999 / 0.001))
    assert m.grad.item() == pytest.approx(expected)
    assert (m.grad.item() > 0) == (margin == 9.0)
    assert (abs(m.grad.item()) < 1e-10) == (margin == -30.0)


def test_both_responses_and_their_lengths_count() -> None:
    """Per token: β (-4/2 + 9/3) = 1."""
    x = pair_inputs(([-6.0], [-10.0]), ([2.0], [3.0]), ([-2.0], [-1.0]))
    mean = DPKDEXOLoss(DPKDEXOConfig(beta=1, aggregation="mean"))
    torch.testing.assert_close(mean(x), _at(1.0))


@pytest.mark.parametrize(
    "wrong", [{"beta": 0}, {"label_smoothing": 0}, {"label_smoothing": 0.5}, {"aggregation": "total"}], ids=str
)
def test_bounds(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="Input should be"):
        DPKDEXOConfig(**wrong)
