"""`sft` against -log q of the label, by hand and by loops."""

from __future__ import annotations

import math

import pytest
import torch
from dpkd_zoo.sft import SPEC, SFTConfig, SFTLoss
from oracles import log_probs
from zoo_inputs import randn, token_inputs

from dpkd.api import TeacherAccess, Text

LOSS = SFTLoss(SFTConfig())


def test_is_minus_log_of_the_labels_probability() -> None:
    probabilities = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]])
    values = LOSS(token_inputs(probabilities.log(), targets=[1, 2]))
    assert values.tolist() == pytest.approx([math.log(4), -math.log(0.7)])


def test_equals_loops() -> None:
    logits, targets = randn(5, 7, seed=1), [0, 6, 3, 3, 1]
    expected = [-log_probs(row)[target] for row, target in zip(logits.tolist(), targets, strict=True)]
    assert LOSS(token_inputs(logits, targets=targets)).tolist() == pytest.approx(expected, abs=1e-12)


def test_gradient_is_q_minus_one_hot() -> None:
    logits = randn(3, 4, seed=2).requires_grad_()
    LOSS(token_inputs(logits, targets=[0, 1, 3])).sum().backward()
    expected = logits.detach().softmax(-1) - torch.eye(4, dtype=torch.float64)[[0, 1, 3]]
    torch.testing.assert_close(logits.grad, expected)


def test_needs_no_teacher_and_no_student_text() -> None:
    assert SPEC.needs() is TeacherAccess.NONE
    assert Text.STUDENT not in SPEC.accepts
