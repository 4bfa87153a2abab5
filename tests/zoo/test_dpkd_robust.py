"""`dpkd-robust`: unbiased under flipped pairs, which label smoothing is not, and without a lower bound."""

from __future__ import annotations

from typing import Any

import oracles_pair
import pytest
import torch
from dpkd_zoo.dpkd import DPKDConfig, DPKDLoss
from dpkd_zoo.dpkd_robust import SPEC, DPKDRobustConfig, DPKDRobustLoss
from oracles_pair import sigma, softplus
from zoo_inputs import pair_inputs, random_pairs

from dpkd.api import Trait
from dpkd.testing import Outcome, check_loss


@pytest.mark.parametrize(
    "settings", [{}, {"flipped": 0.0}, {"flipped": 0.4, "beta": 0.5}, {"aggregation": "sum"}], ids=str
)
def test_conforms_and_equals_loops(settings: dict[str, Any]) -> None:
    report = check_loss(SPEC, config=settings, reference=oracles_pair.robust)
    assert report.named(Outcome.WARNED) == ()


def _at(margin: float, **settings: Any) -> float:
    x = pair_inputs(([margin - 3], [-4.0]), ([1.0], [1.0]), ([-3.0], [-4.0]))
    return DPKDRobustLoss(DPKDRobustConfig(beta=1, **settings))(x).item()


@pytest.mark.parametrize("flipped", [0.05, 0.2, 0.45])
@pytest.mark.parametrize("margin", [-3.0, 0.0, 0.7, 6.0])
def test_expectation_over_flipped_pairs_is_the_clean_loss(flipped: float, margin: float) -> None:
    seen = (1 - flipped) * _at(margin, flipped=flipped) + flipped * _at(-margin, flipped=flipped)
    assert seen == pytest.approx(softplus(-margin))
    smoothed = DPKDLoss(DPKDConfig(beta=1, label_smoothing=flipped))
    pair = [
        smoothed(pair_inputs(([m - 3], [-4.0]), ([1.0], [1.0]), ([-3.0], [-4.0]))).item() for m in (margin, -margin)
    ]
    biased = (1 - flipped) * pair[0] + flipped * pair[1]
    assert (biased == pytest.approx(softplus(-margin))) == (margin == 0)


@pytest.mark.parametrize("aggregation", ["mean", "sum"])
def test_is_dpkd_where_no_pair_is_wrong(aggregation: str) -> None:
    inputs = random_pairs(6, seed=1)
    robust = DPKDRobustLoss(DPKDRobustConfig(beta=0.7, flipped=0, aggregation=aggregation))(pair_inputs(*inputs))
    plain = DPKDLoss(DPKDConfig(beta=0.7, aggregation=aggregation))(pair_inputs(*inputs))
    torch.testing.assert_close(robust, plain)


def test_gradient_closed_form() -> None:
    """-β/(1-2ε) [(1-ε) σ(-m) + ε σ(m)] for log q/p(y_t), over |y_t|."""
    (q_t, q_s), (n_t, n_s), (p_t, p_s) = random_pairs(5, seed=2)
    q_t.requires_grad_()
    q_s.requires_grad_()
    loss = DPKDRobustLoss(DPKDRobustConfig(beta=0.7, flipped=0.2))
    loss(pair_inputs((q_t, q_s), (n_t, n_s), (p_t, p_s))).sum().backward()
    assert q_t.grad is not None
    assert q_s.grad is not None
    margins = (0.7 * ((q_t - p_t) / n_t - (q_s - p_s) / n_s)).tolist()
    for i, m in enumerate(margins):
        weight = 0.7 / 0.6 * (0.8 * sigma(-m) + 0.2 * sigma(m))
        assert q_t.grad[i].item() == pytest.approx(-weight / n_t[i].item())
        assert q_s.grad[i].item() == pytest.approx(weight / n_s[i].item())


def test_falls_without_bound_as_the_card_says() -> None:
    """With ε = 0.1 the slope ends at -ε/(1-2ε) = -1/8."""
    assert _at(1000.0) == pytest.approx(-125)
    assert _at(1000.0) - _at(1008.0) == pytest.approx(1)
    assert Trait.NON_NEGATIVE not in SPEC.traits
    assert "without bound" in SPEC.card.avoid_when


@pytest.mark.parametrize("wrong", [{"beta": 0}, {"flipped": -0.1}, {"flipped": 0.5}, {"aggregation": "total"}], ids=str)
def test_bounds(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="Input should be"):
        DPKDRobustConfig(**wrong)
