"""`dpo`: the student's own start as reference, which is what tells it from `dpkd`."""

from __future__ import annotations

import math
from typing import Any

import oracles_pair
import pytest
import torch
from dpkd_zoo.dpkd import DPKDConfig, DPKDLoss
from dpkd_zoo.dpo import SPEC, DPOConfig, DPOLoss
from oracles_pair import sigma, softplus
from zoo_inputs import pair_inputs, random_pairs

from dpkd.api import PairInputs, Signal, TeacherAccess, UndeclaredSignal
from dpkd.testing import Outcome, check_loss


@pytest.mark.parametrize("settings", [{}, {"aggregation": "mean"}, {"beta": 0.5, "label_smoothing": 0.2}], ids=str)
def test_conforms_and_equals_loops(settings: dict[str, Any]) -> None:
    report = check_loss(SPEC, config=settings, reference=oracles_pair.dpo)
    assert report.named(Outcome.WARNED) == ()


def test_margin_by_hand() -> None:
    """log q/q₀ is 1 for y_t and -2 for y_s; lengths do not count by default."""
    x = pair_inputs(([-2.0], [-6.0]), ([2.0], [4.0]), reference=([-3.0], [-4.0]))
    assert DPOLoss(DPOConfig(beta=1))(x).item() == pytest.approx(softplus(-3))
    assert DPOLoss(DPOConfig(beta=1, aggregation="mean"))(x).item() == pytest.approx(softplus(-1))


def test_starts_at_log_two_without_regard_to_the_teacher() -> None:
    student, lengths, _ = random_pairs(3, seed=4)
    values = DPOLoss(DPOConfig())(pair_inputs(student, lengths, reference=student))
    assert values.tolist() == pytest.approx([math.log(2)] * 3)


@pytest.mark.parametrize("aggregation", ["sum", "mean"])
def test_is_dpkd_with_another_reference(aggregation: str) -> None:
    student, lengths, other = random_pairs(6, seed=1)
    dpo = DPOLoss(DPOConfig(beta=0.7, aggregation=aggregation, label_smoothing=0.1))
    dpkd = DPKDLoss(DPKDConfig(beta=0.7, aggregation=aggregation, label_smoothing=0.1))
    torch.testing.assert_close(
        dpo(pair_inputs(student, lengths, reference=other)), dpkd(pair_inputs(student, lengths, other))
    )


def test_gradient_closed_form() -> None:
    (q_t, q_s), lengths, (r_t, r_s) = random_pairs(5, seed=2)
    q_t.requires_grad_()
    q_s.requires_grad_()
    DPOLoss(DPOConfig(beta=0.7))(pair_inputs((q_t, q_s), lengths, reference=(r_t, r_s))).sum().backward()
    assert q_t.grad is not None
    assert q_s.grad is not None
    weights = [0.7 * sigma(-0.7 * m) for m in (q_t - r_t - q_s + r_s).tolist()]
    assert q_t.grad.tolist() == pytest.approx([-w for w in weights])
    assert q_s.grad.tolist() == pytest.approx(weights)


def test_needs_the_reference_and_nothing_of_the_teacher() -> None:
    assert SPEC.needs() is TeacherAccess.NONE
    assert Signal.REFERENCE_LOGPS in SPEC.signals()
    student, lengths, teacher = random_pairs(2, seed=5)
    with pytest.raises(UndeclaredSignal, match="reference_logps"):
        DPOLoss(DPOConfig())(pair_inputs(student, lengths, teacher))
    assert isinstance(pair_inputs(student, lengths, reference=teacher), PairInputs)


@pytest.mark.parametrize(
    "wrong", [{"beta": 0}, {"aggregation": "total"}, {"label_smoothing": -0.1}, {"label_smoothing": 0.5}], ids=str
)
def test_bounds(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="Input should be"):
        DPOConfig(**wrong)
