"""`distillm2`: each half where it belongs, by loops, and as `skl` and `srkl` on the same rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from dpkd_zoo.distillm2 import SPEC, DistiLLM2Config, DistiLLM2Loss
from dpkd_zoo.skl import SKLConfig, SKLLoss
from dpkd_zoo.srkl import SRKLConfig, SRKLLoss
from oracles_token import divergence, mixture, softmax
from token_helpers import gradient, out, value
from zoo_inputs import randn, token_inputs

from dpkd.api import Signal, Text, TokenInputs
from dpkd.config.extras import own_text
from dpkd.plugins import load_registry
from dpkd.testing import check_loss

STUDENT, TEACHER, OWN = randn(6, 5, seed=1), randn(6, 5, seed=2), torch.tensor([0, 1, 1, 0, 1, 0]).bool()


def oracle(*, student_logits: Any, teacher_logits: Any, by_student: Any, config: DistiLLM2Config) -> Any:
    values = []
    for z_q, z_p, own in zip(student_logits.tolist(), teacher_logits.tolist(), by_student.tolist(), strict=True):
        q, p, a, b = softmax(z_q), softmax(z_p), config.skew_teacher, config.skew_student
        half = (
            config.beta * divergence(q, mixture(q, p, b))
            if own
            else (1 - config.beta) * divergence(p, mixture(p, q, a))
        )
        values.append(2 * half)
    return np.array(values)


def inputs(student: torch.Tensor, own: torch.Tensor = OWN) -> TokenInputs:
    return TokenInputs({**token_inputs(student, TEACHER)._signals, Signal.BY_STUDENT: own})


@pytest.mark.parametrize("settings", [{}, {"beta": 0.75}, {"skew_teacher": 0.3, "skew_student": 0.0}])
def test_conforms_and_equals_loops(settings: dict[str, Any]) -> None:
    check_loss(SPEC, config=settings, reference=oracle)


def test_is_skl_on_the_teachers_rows_and_srkl_on_the_students() -> None:
    student = STUDENT.clone().requires_grad_()
    x = inputs(student)
    values = DistiLLM2Loss(DistiLLM2Config(skew_teacher=0.2, skew_student=0.4))(x)
    values.sum().backward()
    for loss, rows in ((SKLLoss(SKLConfig(skew=0.2)), ~OWN), (SRKLLoss(SRKLConfig(skew=0.4)), OWN)):
        torch.testing.assert_close(values[rows].detach(), value(loss, STUDENT, TEACHER)[rows])
        torch.testing.assert_close(student.grad[rows], gradient(loss, STUDENT, TEACHER)[rows])  # type: ignore[index]
    assert x.parts["skl"].shape == (3,)


@pytest.mark.parametrize("own", [torch.zeros(6).bool(), torch.ones(6).bool()])
def test_one_writer_alone(own: torch.Tensor) -> None:
    same = SRKLLoss(SRKLConfig()) if own.all() else SKLLoss(SKLConfig())
    values = DistiLLM2Loss(DistiLLM2Config())(inputs(STUDENT, own))
    torch.testing.assert_close(values, value(same, STUDENT, TEACHER))


def test_infinite_rows_of_one_half_leave_the_gradient_of_the_other_alone() -> None:
    """Without a skew the teacher's rows are infinite where the student excludes a token."""
    student = out(STUDENT, 2).requires_grad_()
    values = DistiLLM2Loss(DistiLLM2Config(skew_teacher=0.0))(inputs(student))
    assert values[~OWN].isinf().all()
    values[OWN].sum().backward()
    assert student.grad is not None
    assert student.grad.isfinite().all()


def test_every_prompt_has_a_response_by_each_once_an_epoch() -> None:
    text = own_text(SPEC, {}, "text", load_registry())[1]
    assert (text.source, text.each, text.refresh) == ("each", (Text.TEACHER, Text.STUDENT), "per_epoch")
    assert text.sampling.temperature == text.teacher_sampling.temperature == 0.8
