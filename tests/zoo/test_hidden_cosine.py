"""`hidden-cosine`: by hand, lengths do not count, and its layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dpkd_zoo.hidden_cosine import SPEC, HiddenCosineConfig, HiddenCosineLoss
from oracles_hidden import cosine, hidden_reference
from zoo_inputs import hidden_inputs, randn

from dpkd.api import Layers, Stack, TeacherAccess
from dpkd.testing import check_loss


def bound(student: Stack, teacher: Stack, **settings: Any) -> tuple[HiddenCosineLoss, Layers]:
    loss = HiddenCosineLoss(HiddenCosineConfig(**settings))
    return loss, loss.bind(student, teacher)


@pytest.mark.parametrize("settings", [{}, {"layers": "even"}, {"pairs": [[0, 6]]}, {"projection": "none"}])
def test_conforms_and_equals_loops(settings: dict[str, Any]) -> None:
    check_loss(SPEC, config=settings, reference=hidden_reference(cosine))


def test_by_hand() -> None:
    """Equal directions 0, a right angle 1, opposite ones 2, (1, 0) to (1, 1): 1 - 1/√2."""
    loss, _ = bound(Stack(1, 2), Stack(1, 2), projection="none")
    student = torch.tensor([[[3.0, 4.0]], [[0.0, 2.0]], [[1.0, 0.0]], [[1.0, 0.0]]])
    teacher = torch.tensor([[[6.0, 8.0]], [[5.0, 0.0]], [[-2.0, 0.0]], [[1.0, 1.0]]])
    expected = torch.tensor([0.0, 1.0, 2.0, 1 - 0.5**0.5])
    torch.testing.assert_close(loss(hidden_inputs(student, teacher)), expected)


def test_lengths_do_not_count() -> None:
    loss, layers = bound(Stack(2, 4), Stack(5, 6), layers="even")
    assert layers == Layers((1, 2), (3, 5))
    student, teacher = (randn(3, 2, n, seed=n, dtype=torch.float32) for n in (4, 6))
    torch.testing.assert_close(loss(hidden_inputs(7 * student, 0.1 * teacher)), loss(hidden_inputs(student, teacher)))


def test_its_layers_are_the_last_and_it_refuses_other_widths_without_a_projection() -> None:
    assert bound(Stack(2, 4), Stack(5, 6))[1] == Layers((2,), (5,))
    with pytest.raises(ValueError, match=r"projection is none, but the student's hidden states have 4 .* 6; set"):
        bound(Stack(2, 4), Stack(2, 6), projection="none")
    assert SPEC.needs() is TeacherAccess.HIDDEN


def test_a_state_of_zeros_gives_no_nan() -> None:
    loss, _ = bound(Stack(1, 3), Stack(1, 3))
    student = torch.zeros(1, 1, 3, requires_grad=True)
    value = loss(hidden_inputs(student, torch.ones(1, 1, 3)))
    value.sum().backward()
    assert value.item() == 1.0
    assert student.grad is not None
    assert student.grad.isfinite().all()
