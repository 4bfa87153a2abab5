"""`rkl`: direction, temperature, gradient."""

from __future__ import annotations

import math

import pytest
import torch
from dpkd_zoo.rkl import RKLConfig, RKLLoss
from oracles import divergence, log_probs
from zoo_inputs import randn, token_inputs

LOSS = RKLLoss(RKLConfig())
P, Q = [[0.25, 0.5, 0.25]], [[0.5, 0.5, 0.0]]


def test_direction_is_student_to_teacher() -> None:
    """KL(q‖p) = ½ log 2 and finite, although q is 0 where p is not; the other direction is infinite."""
    p, q = torch.tensor(P).log(), torch.tensor(Q).log()
    assert LOSS(token_inputs(q, p)).item() == pytest.approx(0.5 * math.log(2))
    assert LOSS(token_inputs(p, q)).item() == math.inf


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_equals_loops(temperature: float) -> None:
    student, teacher = randn(4, 6, seed=1), randn(4, 6, seed=2)
    expected = [
        divergence(log_probs(z_q, temperature), log_probs(z_p, temperature))
        for z_q, z_p in zip(student.tolist(), teacher.tolist(), strict=True)
    ]
    values = RKLLoss(RKLConfig(temperature=temperature))(token_inputs(student, teacher))
    assert values.tolist() == pytest.approx(expected, abs=1e-12)


def test_gradient_closed_form() -> None:
    """dKL(q‖p)/dz = q (log q/p - KL)."""
    student, teacher = randn(3, 5, seed=3).requires_grad_(), randn(3, 5, seed=4)
    values = LOSS(token_inputs(student, teacher))
    values.sum().backward()
    log_q, log_p = student.detach().log_softmax(-1), teacher.log_softmax(-1)
    torch.testing.assert_close(student.grad, log_q.exp() * (log_q - log_p - values.detach()[:, None]))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_gradcheck(temperature: float) -> None:
    teacher, loss = randn(3, 4, seed=5), RKLLoss(RKLConfig(temperature=temperature))
    assert torch.autograd.gradcheck(lambda z: loss(token_inputs(z, teacher)), randn(3, 4, seed=6).requires_grad_())
