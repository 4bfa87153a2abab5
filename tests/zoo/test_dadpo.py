"""`dadpo`: two anchors, each with its strength; `dpo` and `dpkd` are what is left without one of them."""

from __future__ import annotations

from typing import Any

import oracles_pair
import pytest
import torch
from dpkd_zoo.dadpo import SPEC, DaDPOConfig, DaDPOLoss
from dpkd_zoo.dpkd import DPKDConfig, DPKDLoss
from dpkd_zoo.dpo import DPOConfig, DPOLoss
from oracles_pair import sigma, softplus
from torch import Tensor
from zoo_inputs import pair_inputs, random_pairs

from dpkd.api import PairInputs, Signal, TeacherAccess
from dpkd.testing import Outcome, check_loss

NOTHING = 1e-12


def _pairs(seed: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], tuple[Tensor, Tensor], PairInputs]:
    """Student, teacher and start as three different models, and the inputs."""
    student, lengths, teacher = random_pairs(6, seed)
    start = random_pairs(6, seed + 50)[0]
    return student, teacher, start, pair_inputs(student, lengths, teacher, start)


@pytest.mark.parametrize("settings", [{}, {"aggregation": "mean"}, {"beta_start": 0.05, "beta_teacher": 0.7}], ids=str)
def test_conforms_and_equals_loops(settings: dict[str, Any]) -> None:
    report = check_loss(SPEC, config=settings, reference=oracles_pair.dadpo)
    assert report.named(Outcome.WARNED) == ()


def test_margins_by_hand() -> None:
    """Against the start 1 + 2 = 3, against the teacher -1 + 3 = 2."""
    x = pair_inputs(([-2.0], [-6.0]), ([2.0], [4.0]), ([-1.0], [-3.0]), ([-3.0], [-4.0]))
    assert DaDPOLoss(DaDPOConfig(beta_start=0.5, beta_teacher=0.25))(x).item() == pytest.approx(softplus(-2))
    assert x.parts["margin_start"].item() == pytest.approx(1.5)
    assert x.parts["margin_teacher"].item() == pytest.approx(0.5)


@pytest.mark.parametrize("aggregation", ["sum", "mean"])
def test_is_dpo_or_dpkd_without_one_anchor(aggregation: str) -> None:
    *_, x = _pairs(seed=1)
    common = {"aggregation": aggregation}
    no_teacher = DaDPOLoss(DaDPOConfig(beta_start=0.7, beta_teacher=NOTHING, **common))
    torch.testing.assert_close(no_teacher(x), DPOLoss(DPOConfig(beta=0.7, **common))(x))
    no_start = DaDPOLoss(DaDPOConfig(beta_start=NOTHING, beta_teacher=0.7, **common))
    torch.testing.assert_close(no_start(x), DPKDLoss(DPKDConfig(beta=0.7, **common))(x))


def test_strengths_add_up_where_the_anchors_agree() -> None:
    student, lengths, teacher = random_pairs(6, seed=3)
    both = DaDPOLoss(DaDPOConfig(beta_start=0.3, beta_teacher=0.4))(pair_inputs(student, lengths, teacher, teacher))
    one = DPKDLoss(DPKDConfig(beta=0.7, aggregation="sum"))(pair_inputs(student, lengths, teacher))
    torch.testing.assert_close(both, one)


def test_gradient_closed_form() -> None:
    """(β₁ + β₂) σ(-m) for each log q."""
    (q_t, q_s), (p_t, p_s), (r_t, r_s), _ = _pairs(seed=2)
    q_t.requires_grad_()
    q_s.requires_grad_()
    lengths = random_pairs(6, seed=2)[1]
    loss = DaDPOLoss(DaDPOConfig(beta_start=0.3, beta_teacher=0.5))
    loss(pair_inputs((q_t, q_s), lengths, (p_t, p_s), (r_t, r_s))).sum().backward()
    assert q_t.grad is not None
    assert q_s.grad is not None
    margins = (0.3 * (q_t - r_t - q_s + r_s) + 0.5 * (q_t - p_t - q_s + p_s)).tolist()
    weights = [0.8 * sigma(-m) for m in margins]
    assert q_t.grad.tolist() == pytest.approx([-w for w in weights])
    assert q_s.grad.tolist() == pytest.approx(weights)


def test_needs_both_anchors_and_says_what_it_is_not_sure_of() -> None:
    assert SPEC.needs() is TeacherAccess.TOKEN_LOGPS
    assert SPEC.signals() >= {Signal.TEACHER_LOGPS, Signal.REFERENCE_LOGPS}
    assert "not the paper itself" in SPEC.card.unconfirmed


@pytest.mark.parametrize("wrong", [{"beta_start": 0}, {"beta_teacher": 0}, {"aggregation": "total"}], ids=str)
def test_bounds(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="Input should be"):
        DaDPOConfig(**wrong)
