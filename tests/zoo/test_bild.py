"""`bild`: pairs of both leaders, temperature, what it does not see, excluded tokens."""

from __future__ import annotations

import math

import pytest
import torch
from dpkd_zoo.bild import SPEC, BiLDConfig, BiLDLoss
from oracles_token import bild, divergence, reference, softmax
from token_helpers import gradient, out, value
from zoo_inputs import randn, token_inputs

from dpkd.testing import check_loss

STUDENT, TEACHER = randn(4, 9, seed=1), randn(4, 9, seed=2)


def _loss(k: int = 8, temperature: float = 3.0) -> BiLDLoss:
    return BiLDLoss(BiLDConfig(k=k, temperature=temperature))


@pytest.mark.parametrize(("k", "temperature"), [(8, 3.0), (3, 1.0), (5, 2.0)])
def test_conforms_and_equals_loops(k: int, temperature: float) -> None:
    check_loss(SPEC, config={"k": k, "temperature": temperature}, reference=reference(bild))


def test_three_tokens_by_hand() -> None:
    """Teacher 4 2 1 0 leads with differences 2 3 1, to which the student 0 3 1 2 has -3 -1 2.

    The student's first three are 1, 3, 2: differences 1 2 1, to which the teacher has 2 1 -1.
    """
    teacher, student = torch.tensor([[4.0, 2.0, 1.0, 0.0]]), torch.tensor([[0.0, 3.0, 1.0, 2.0]])
    x = token_inputs(student, teacher)
    total = _loss(3, 1.0)(x).item()
    teacher_led = divergence(softmax([2, 3, 1]), softmax([-3, -1, 2]))
    student_led = divergence(softmax([2, 1, -1]), softmax([1, 2, 1]))
    assert x.parts["teacher_led"].item() == pytest.approx(teacher_led, rel=1e-5)
    assert x.parts["student_led"].item() == pytest.approx(student_led, rel=1e-5)
    assert total == pytest.approx(teacher_led + student_led, rel=1e-5)


def test_tokens_outside_both_choices_are_not_seen() -> None:
    k = 3
    chosen = torch.zeros_like(STUDENT, dtype=torch.bool)
    for leader in (STUDENT, TEACHER):
        chosen = chosen.scatter(-1, leader.topk(k).indices, True)
    assert (~chosen).any(-1).all()
    assert gradient(_loss(k), STUDENT, TEACHER).masked_fill(chosen, 0).abs().max() == 0
    lower = torch.where(chosen, STUDENT, STUDENT - 7)
    torch.testing.assert_close(value(_loss(k), lower, TEACHER), value(_loss(k), STUDENT, TEACHER))


def test_excluded_tokens() -> None:
    """Both exclude: left out, down to one token and none. One alone excludes a chosen token: infinite."""
    loss, kept = _loss(8), [0, 1, 3, 4, 6]
    student, teacher = out(STUDENT, 2, 5, 7, 8), out(TEACHER, 2, 5, 7, 8)
    torch.testing.assert_close(value(loss, student, teacher), value(loss, student[:, kept], teacher[:, kept]))
    assert gradient(loss, student, teacher).isfinite().all()
    one = out(STUDENT, *range(1, 9))
    assert value(loss, one, one).abs().max() == 0
    assert gradient(loss, one, one).abs().max() == 0
    top = int(TEACHER[0].argmax())
    assert value(_loss(3), out(STUDENT, top), TEACHER)[0].item() == math.inf
