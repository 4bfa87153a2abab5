"""`plad`: a hinge on log-probs per token, with a fixed margin or the teacher's own."""

from __future__ import annotations

from typing import Any

import oracles_pair
import pytest
import torch
from dpkd_zoo.plad import SPEC, PLaDConfig, PLaDLoss
from zoo_inputs import pair_inputs, random_pairs

from dpkd.api import Signal, TeacherAccess
from dpkd.testing import Outcome, check_loss


@pytest.mark.parametrize("settings", [{}, {"margin": 0.2}, {"form": "margin"}], ids=str)
def test_conforms_and_equals_loops(settings: dict[str, Any]) -> None:
    report = check_loss(SPEC, config=settings, reference=oracles_pair.plad)
    assert report.named(Outcome.WARNED) == ()


def test_ranking_by_hand() -> None:
    """-1 and -1.5 per token: half of the margin 1 is reached, and all of 0.4."""
    x = pair_inputs(([-3.0], [-3.0]), ([3.0], [2.0]))
    assert PLaDLoss(PLaDConfig())(x).item() == pytest.approx(0.5)
    assert x.parts["margin"].item() == pytest.approx(0.5)
    assert PLaDLoss(PLaDConfig(margin=0.4))(x).item() == 0


def test_margin_form_asks_for_the_teachers_difference_per_token() -> None:
    """The teacher has -0.5 and -2 per token: 1.5 wanted, 0.5 there."""
    x = pair_inputs(([-3.0], [-3.0]), ([3.0], [2.0]), ([-1.5], [-4.0]))
    assert PLaDLoss(PLaDConfig(form="margin"))(x).item() == pytest.approx(1)
    # A teacher that prefers y_s asks for nothing more than not to overdo it.
    turned = pair_inputs(([-3.0], [-3.0]), ([3.0], [2.0]), ([-6.0], [-1.0]))
    assert PLaDLoss(PLaDConfig(form="margin"))(turned).item() == 0


def test_margin_form_is_zero_where_the_student_is_the_teacher() -> None:
    student, lengths, _ = random_pairs(5, seed=2)
    values = PLaDLoss(PLaDConfig(form="margin"))(pair_inputs(student, lengths, student))
    assert values.tolist() == pytest.approx([0] * 5)


@pytest.mark.parametrize(("margin", "slope"), [(1.0, 1.0), (0.5, 0.0), (0.4, 0.0)])
def test_gradient_closed_form(margin: float, slope: float) -> None:
    """-1/|y_t| and 1/|y_s| while the margin is not reached."""
    q_t = torch.tensor([-3.0], dtype=torch.float64, requires_grad=True)
    q_s = torch.tensor([-3.0], dtype=torch.float64, requires_grad=True)
    PLaDLoss(PLaDConfig(margin=margin))(pair_inputs((q_t, q_s), ([3.0], [2.0]))).sum().backward()
    assert q_t.grad is not None
    assert q_s.grad is not None
    assert q_t.grad.item() == pytest.approx(-slope / 3)
    assert q_s.grad.item() == pytest.approx(slope / 2)


def test_reads_the_teacher_only_for_its_margin() -> None:
    assert SPEC.needs() is TeacherAccess.NONE
    assert SPEC.needs(PLaDConfig(form="margin")) is TeacherAccess.TOKEN_LOGPS
    assert Signal.TEACHER_LOGPS not in SPEC.signals()


def test_says_what_it_is_not_sure_of() -> None:
    assert "exact form" in SPEC.card.unconfirmed


@pytest.mark.parametrize("wrong", [{"margin": 0}, {"form": "hinge"}], ids=str)
def test_bounds(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="Input should be"):
        PLaDConfig(**wrong)
