"""`seqkd`: likelihood of teacher text, and the mixture of the released scripts."""

from __future__ import annotations

import pytest
import torch
from dpkd_zoo.seqkd import SPEC
from oracles import divergence, log_probs
from zoo_inputs import randn, token_inputs

from dpkd.api import Signal, TeacherAccess, Text


def test_default_is_the_likelihood_alone() -> None:
    student, targets = randn(4, 5, seed=1), [0, 4, 2, 1]
    expected = [-log_probs(row)[target] for row, target in zip(student.tolist(), targets, strict=True)]
    values = SPEC.loss(SPEC.config())(token_inputs(student, targets=targets))
    assert values.tolist() == pytest.approx(expected, abs=1e-12)


def test_word_level_share_equals_loops() -> None:
    student, teacher, targets = randn(3, 5, seed=2), randn(3, 5, seed=3), [4, 0, 1]
    expected = [
        0.75 * -log_probs(z_q)[target] + 0.25 * divergence(log_probs(z_p), log_probs(z_q))
        for z_q, z_p, target in zip(student.tolist(), teacher.tolist(), targets, strict=True)
    ]
    values = SPEC.loss(SPEC.config(kd_ratio=0.25))(token_inputs(student, teacher, targets))
    assert values.tolist() == pytest.approx(expected, abs=1e-12)


def test_share_of_one_is_pure_kl() -> None:
    logits = randn(2, 5, seed=4)
    assert SPEC.loss(SPEC.config(kd_ratio=1))(token_inputs(logits, logits, [0, 1])).abs().max() < 1e-15


def test_teacher_logits_are_needed_only_for_the_mixture() -> None:
    assert SPEC.needs() is TeacherAccess.NONE
    assert SPEC.needs(SPEC.config(kd_ratio=0.5)) is TeacherAccess.LOGITS
    assert Signal.TEACHER_LOGITS not in SPEC.signals()


def test_suggests_teacher_text() -> None:
    assert SPEC.suggests["text"]["source"] == "teacher"
    assert Text.TEACHER in SPEC.accepts


@pytest.mark.parametrize("ratio", [0.0, 0.5])
def test_gradcheck(ratio: float) -> None:
    teacher, loss = randn(3, 4, seed=5), SPEC.loss(SPEC.config(kd_ratio=ratio))
    assert torch.autograd.gradcheck(
        lambda z: loss(token_inputs(z, teacher, [1, 0, 3])), randn(3, 4, seed=6).requires_grad_()
    )
