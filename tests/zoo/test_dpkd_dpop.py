"""`dpkd-dpop`: the penalty inside σ, where it acts, and the gradient on both sides of it."""

from __future__ import annotations

import math
from typing import Any

import oracles_pair
import pytest
import torch
from dpkd_zoo.dpkd import DPKDConfig, DPKDLoss
from dpkd_zoo.dpkd_dpop import SPEC, DPKDDPOPConfig, DPKDDPOPLoss
from oracles_pair import sigma, softplus
from zoo_inputs import pair_inputs, random_pairs

from dpkd.testing import Outcome, check_loss


@pytest.mark.parametrize(
    "settings", [{}, {"aggregation": "sum"}, {"beta": 0.3, "dpop_weight": 5.0}, {"dpop_weight": 0.0}], ids=str
)
def test_conforms_and_equals_loops(settings: dict[str, Any]) -> None:
    report = check_loss(SPEC, config=settings, reference=oracles_pair.dpop)
    assert report.named(Outcome.WARNED) == ()


def test_penalty_by_hand() -> None:
    """log q/p is -2 for y_t and -6 for y_s, as sums: h = 4, penalty 2, and 4 - 3·2 = -2 inside σ."""
    x = pair_inputs(([-5.0], [-9.0]), ([2.0], [4.0]), ([-3.0], [-3.0]))
    loss = DPKDDPOPLoss(DPKDDPOPConfig(beta=1, dpop_weight=3, aggregation="sum"))
    assert loss(x).item() == pytest.approx(softplus(2))
    assert x.parts["penalty"].tolist() == [2.0]
    assert x.parts["margin"].tolist() == [4.0]
    # Per token: -1 and -1.5, h = 0.5, penalty 1.
    mean = DPKDDPOPLoss(DPKDDPOPConfig(beta=1, dpop_weight=3))
    assert mean(x).item() == pytest.approx(softplus(2.5))


@pytest.mark.parametrize("aggregation", ["mean", "sum"])
def test_is_dpkd_without_the_penalty(aggregation: str) -> None:
    inputs = random_pairs(6, seed=1)
    plain = DPKDLoss(DPKDConfig(beta=0.7, aggregation=aggregation))(pair_inputs(*inputs))
    weightless = DPKDDPOPLoss(DPKDDPOPConfig(beta=0.7, dpop_weight=0, aggregation=aggregation))
    torch.testing.assert_close(weightless(pair_inputs(*inputs)), plain)
    # Where y_t is likelier to the student than to the teacher, whatever the weight.
    student, lengths, (p_t, p_s) = inputs
    above = (student[0] - 0.1, p_s)
    full = DPKDDPOPLoss(DPKDDPOPConfig(beta=0.7, aggregation=aggregation))(pair_inputs(student, lengths, above))
    same = DPKDLoss(DPKDConfig(beta=0.7, aggregation=aggregation))(pair_inputs(student, lengths, above))
    torch.testing.assert_close(full, same)
    assert not torch.allclose(p_t, student[0] - 0.1)


@pytest.mark.parametrize(("ratio_t", "slope"), [(-0.5, 6.0), (0.5, 1.0)])
def test_gradient_closed_form(ratio_t: float, slope: float) -> None:
    """y_t: -β σ(-m) (1 + λ [log q/p(y_t) < 0]); y_s: β σ(-m), as in dpkd."""
    q_t = torch.tensor([-2.0 + ratio_t], dtype=torch.float64, requires_grad=True)
    q_s = torch.tensor([-3.0], dtype=torch.float64, requires_grad=True)
    loss = DPKDDPOPLoss(DPKDDPOPConfig(beta=0.7, dpop_weight=5, aggregation="sum"))
    loss(pair_inputs((q_t, q_s), ([3.0], [4.0]), ([-2.0], [-2.5]))).sum().backward()
    margin = 0.7 * (ratio_t + 0.5 - 5 * max(0.0, -ratio_t))
    assert q_t.grad is not None
    assert q_s.grad is not None
    assert q_t.grad.item() == pytest.approx(-0.7 * sigma(-margin) * slope)
    assert q_s.grad.item() == pytest.approx(0.7 * sigma(-margin))


def test_both_likelihoods_falling_costs_more_than_it_does_under_dpkd() -> None:
    """y_t down by 1 nat and y_s by 3: dpkd is pleased, the penalty is not."""
    before = pair_inputs(([-4.0], [-4.0]), ([2.0], [2.0]), ([-4.0], [-4.0]))
    after = pair_inputs(([-5.0], [-7.0]), ([2.0], [2.0]), ([-4.0], [-4.0]))
    dpkd, dpop = DPKDLoss(DPKDConfig()), DPKDDPOPLoss(DPKDDPOPConfig())
    assert dpkd(after).item() < dpkd(before).item() == pytest.approx(math.log(2))
    assert dpop(after).item() > dpop(before).item() == pytest.approx(math.log(2))


def test_at_match_the_penalty_has_no_gradient() -> None:
    student, lengths, _ = random_pairs(3, seed=4)
    q_t = student[0].clone().requires_grad_()
    loss = DPKDDPOPLoss(DPKDDPOPConfig(beta=1, aggregation="sum"))
    loss(pair_inputs((q_t, student[1]), lengths, student)).sum().backward()
    assert q_t.grad is not None
    assert q_t.grad.tolist() == pytest.approx([-0.5] * 3)


@pytest.mark.parametrize("wrong", [{"beta": 0}, {"dpop_weight": -1}, {"aggregation": "total"}], ids=str)
def test_bounds(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="Input should be"):
        DPKDDPOPConfig(**wrong)
