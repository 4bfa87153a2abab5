"""`taid`: the target between student and teacher, its ends, its gradient, its schedule."""

from __future__ import annotations

import pytest
import torch
from dpkd_zoo.fkl import FKLConfig, FKLLoss
from dpkd_zoo.taid import SPEC, TAIDConfig, TAIDLoss
from oracles_token import reference, taid, taid_target
from token_helpers import gradient, out, value
from zoo_inputs import randn

from dpkd.config.settings import RunSettings
from dpkd.testing import check_loss

STUDENT, TEACHER = randn(4, 6, seed=1), randn(4, 6, seed=2)


def _loss(t: float) -> TAIDLoss:
    return TAIDLoss(TAIDConfig(t=t))


@pytest.mark.parametrize("t", [0.2, 0.4, 0.9, 1.0])
def test_conforms_and_equals_loops(t: float) -> None:
    check_loss(SPEC, config={"t": t}, reference=reference(taid))


@pytest.mark.parametrize("t", [0.2, 0.5, 1.0])
def test_gradient_is_student_minus_target(t: float) -> None:
    """As with any fixed target: nothing flows through the student's share in it."""
    targets = [taid_target(z_p, z_q, t) for z_p, z_q in zip(TEACHER.tolist(), STUDENT.tolist(), strict=True)]
    expected = STUDENT.softmax(-1) - torch.tensor(targets, dtype=torch.float64)
    torch.testing.assert_close(gradient(_loss(t), STUDENT, TEACHER), expected)


def test_the_teacher_is_where_t_is_1() -> None:
    """t = 1 is forward KL; a t the wrong way round would be 0 here."""
    forward = FKLLoss(FKLConfig())
    torch.testing.assert_close(value(_loss(1), STUDENT, TEACHER), value(forward, STUDENT, TEACHER))
    torch.testing.assert_close(gradient(_loss(1), STUDENT, TEACHER), gradient(forward, STUDENT, TEACHER))


def test_the_student_is_where_t_is_0() -> None:
    student, teacher = out(STUDENT, 1), out(TEACHER, 4)
    assert value(_loss(0), student, teacher).abs().max() == 0
    assert gradient(_loss(0), student, teacher).abs().max() < 1e-15


def test_the_target_comes_nearer_to_the_teacher_with_t() -> None:
    values = torch.stack([value(_loss(t), STUDENT, TEACHER) for t in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)])
    assert (values.diff(dim=0) > 0).all()


def test_a_token_that_either_excludes_is_not_in_the_target() -> None:
    student, teacher = out(STUDENT, 1), out(TEACHER, 4)
    kept = [0, 2, 3, 5]
    target = (0.6 * student[:, kept] + 0.4 * teacher[:, kept]).softmax(-1)
    expected = student.softmax(-1)
    expected[:, kept] -= target
    torch.testing.assert_close(gradient(_loss(0.4), student, teacher), expected)


def test_suggests_the_papers_schedule() -> None:
    schedule = RunSettings.model_validate(dict(SPEC.suggests)).schedules["t"]
    assert (schedule.shape, schedule.start, schedule.end) == ("by-loss", 0.4, 1.0)
    assert (schedule.rate, schedule.momentum) == (5e-4, 0.99)
    assert TAIDConfig().t == schedule.start
