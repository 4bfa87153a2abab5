"""`hidden-mse`: by hand, its layers, its projection, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dpkd_zoo.hidden_mse import SPEC, HiddenMSEConfig, HiddenMSELoss
from oracles_hidden import hidden_reference, squared
from zoo_inputs import hidden_inputs, randn

from dpkd.api import Layers, Stack, TeacherAccess
from dpkd.testing import check_loss


def bound(student: Stack, teacher: Stack, **settings: Any) -> tuple[HiddenMSELoss, Layers]:
    loss = HiddenMSELoss(HiddenMSEConfig(**settings))
    return loss, loss.bind(student, teacher)


@pytest.mark.parametrize("settings", [{}, {"layers": "last"}, {"pairs": [[0, 6]]}, {"projection": "none"}])
def test_conforms_and_equals_loops(settings: dict[str, Any]) -> None:
    check_loss(SPEC, config=settings, reference=hidden_reference(squared))


def test_by_hand() -> None:
    """Layer 1: W s = (1·1 + 2·2, 3·1) = (5, 3) against (4, 1), squares 1 and 4 over 2. Layer 2: 0 against (2, 0)."""
    loss, _ = bound(Stack(2, 2), Stack(2, 2))
    with torch.no_grad():
        loss.weight.copy_(torch.tensor([[[1.0, 2.0], [3.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]]))
    x = hidden_inputs([[[1.0, 2.0], [7.0, 7.0]]], [[[4.0, 1.0], [2.0, 0.0]]])
    assert loss(x).tolist() == [2.5 + 2.0]


def test_layers() -> None:
    assert bound(Stack(3, 4), Stack(12, 4))[1] == Layers((1, 2, 3), (4, 8, 12))
    assert bound(Stack(2, 4), Stack(5, 4))[1] == Layers((1, 2), (3, 5))
    assert bound(Stack(6, 4), Stack(4, 4))[1] == Layers((1, 2, 3, 4, 5, 6), (1, 2, 2, 3, 4, 4))
    assert bound(Stack(2, 4), Stack(5, 4), layers="last")[1] == Layers((2,), (5,))
    assert bound(Stack(2, 4), Stack(5, 4), pairs=[[0, 0], [2, 3]])[1] == Layers((0, 2), (0, 3))


def test_a_copy_costs_nothing_at_the_start_where_widths_are_equal() -> None:
    loss, layers = bound(Stack(3, 4), Stack(3, 4))
    states = randn(5, len(layers.student), 4, seed=1, dtype=torch.float32)
    assert loss(hidden_inputs(states, states)).abs().max() == 0


@pytest.mark.parametrize(("student", "teacher"), [(3, 5), (5, 3)])
def test_another_width_starts_orthonormal(student: int, teacher: int) -> None:
    loss, _ = bound(Stack(1, student), Stack(1, teacher))
    (matrix,) = loss.weight.detach()
    small = matrix.T @ matrix if teacher > student else matrix @ matrix.T
    torch.testing.assert_close(small, torch.eye(3))


def test_what_it_refuses_and_needs() -> None:
    with pytest.raises(ValueError, match=r"projection is none, but the student's hidden states have 4 .* 6; set"):
        bound(Stack(2, 4), Stack(2, 6), projection="none")
    loss, _ = bound(Stack(2, 4), Stack(2, 4), projection="none")
    assert not list(loss.parameters())
    assert SPEC.needs() is TeacherAccess.HIDDEN
