"""`fkl`: direction, temperature, gradient."""

from __future__ import annotations

import math

import pytest
import torch
from dpkd_zoo.fkl import SPEC, FKLConfig, FKLLoss
from dpkd_zoo.kd import KDConfig, KDLoss
from oracles_token import fkl, reference
from token_helpers import gradient, logs, out, value
from zoo_inputs import randn, token_inputs

from dpkd.testing import check_loss

P, Q = logs([0.5, 0.5, 0.0]), logs([0.25, 0.5, 0.25])
LOSS = FKLLoss(FKLConfig())


@pytest.mark.parametrize("settings", [{}, {"temperature": 2.0}, {"temperature": 0.5, "scale_by_t2": True}])
def test_conforms_and_equals_loops(settings: dict[str, float]) -> None:
    hot = {"linear_in_the_teacher": "samples are drawn at temperature 1"} if settings else {}
    check_loss(SPEC, config=settings, reference=reference(fkl), expected_failures=hot)


def test_direction_is_teacher_to_student() -> None:
    assert value(LOSS, Q, P).item() == pytest.approx(0.5 * math.log(2))
    assert value(LOSS, P, Q).item() == math.inf


def test_gradient_is_student_minus_teacher() -> None:
    student, teacher = randn(3, 5, seed=1), randn(3, 5, seed=2)
    torch.testing.assert_close(gradient(LOSS, student, teacher), student.softmax(-1) - teacher.softmax(-1))


def test_a_token_that_the_teacher_excludes_is_pressed_down() -> None:
    student, teacher = randn(3, 5, seed=1), out(randn(3, 5, seed=2), 4)
    found = gradient(LOSS, student, teacher)
    torch.testing.assert_close(found[:, 4], student.softmax(-1)[:, 4])


def test_is_kd_without_cross_entropy() -> None:
    student, teacher = randn(3, 5, seed=1), randn(3, 5, seed=2)
    kd = KDLoss(KDConfig(kd_ratio=1, temperature=3, scale_by_t2=True))
    torch.testing.assert_close(
        value(FKLLoss(FKLConfig(temperature=3, scale_by_t2=True)), student, teacher), kd(token_inputs(student, teacher))
    )
