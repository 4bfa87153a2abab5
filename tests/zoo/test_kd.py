"""`kd`: direction, mixture, temperature."""

from __future__ import annotations

import math

import pytest
import torch
from dpkd_zoo.kd import KDConfig, KDLoss
from oracles import divergence, log_probs
from pydantic import ValidationError
from zoo_inputs import randn, token_inputs

P, Q = [0.5, 0.5, 0.0], [0.25, 0.5, 0.25]
PURE = KDLoss(KDConfig(kd_ratio=1.0))


def _logs(probabilities: list[float]) -> torch.Tensor:
    return torch.tensor([probabilities], dtype=torch.float64).log()


def test_direction_is_teacher_to_student() -> None:
    """KL(p‖q) = ½ log 2 and finite, although p is 0 where q is not; the other direction is infinite."""
    assert PURE(token_inputs(_logs(Q), _logs(P), [0])).item() == pytest.approx(0.5 * math.log(2))
    assert PURE(token_inputs(_logs(P), _logs(Q), [0])).item() == math.inf


def test_default_is_half_cross_entropy_half_kl() -> None:
    value = KDLoss(KDConfig())(token_inputs(_logs(Q), _logs(P), [2])).item()
    assert value == pytest.approx(0.5 * math.log(4) + 0.5 * 0.5 * math.log(2))


@pytest.mark.parametrize(
    ("ratio", "temperature", "scaled"), [(0.5, 1, False), (1, 2, False), (0.3, 2, True), (1, 3, True)]
)
def test_equals_loops(ratio: float, temperature: float, scaled: bool) -> None:
    student, teacher, targets = randn(4, 6, seed=1), randn(4, 6, seed=2), [5, 0, 2, 2]
    expected = []
    for z_q, z_p, target in zip(student.tolist(), teacher.tolist(), targets, strict=True):
        soft = divergence(log_probs(z_p, temperature), log_probs(z_q, temperature))
        soft *= temperature**2 if scaled else 1
        expected.append((1 - ratio) * -log_probs(z_q)[target] + ratio * soft)
    loss = KDLoss(KDConfig(kd_ratio=ratio, temperature=temperature, scale_by_t2=scaled))
    assert loss(token_inputs(student, teacher, targets)).tolist() == pytest.approx(expected, abs=1e-12)


def test_gradient_is_that_of_the_soft_cross_entropy_of_released_code() -> None:
    """d/dz of -Σ p log q is q - p."""
    student, teacher = randn(3, 5, seed=3).requires_grad_(), randn(3, 5, seed=4)
    PURE(token_inputs(student, teacher, [0, 1, 2])).sum().backward()
    torch.testing.assert_close(student.grad, student.detach().softmax(-1) - teacher.softmax(-1))


def test_t2_keeps_the_size_of_the_gradient() -> None:
    """At a high temperature T² KL has a gradient of about (z_q - z_p)/V for centred logits (Hinton et al., Eq. 4)."""
    student = randn(2, 4, seed=5, scale=1.0)
    teacher = randn(2, 4, seed=6, scale=1.0)
    student, teacher = student - student.mean(-1, keepdim=True), teacher - teacher.mean(-1, keepdim=True)
    student.requires_grad_()
    loss = KDLoss(KDConfig(kd_ratio=1, temperature=1000, scale_by_t2=True))
    loss(token_inputs(student, teacher, [0, 0])).sum().backward()
    torch.testing.assert_close(student.grad, (student.detach() - teacher) / 4, atol=1e-2, rtol=0)


@pytest.mark.parametrize("ratio", [0.5, 1.0])
def test_gradcheck(ratio: float) -> None:
    teacher, loss = randn(3, 4, seed=7), KDLoss(KDConfig(kd_ratio=ratio, temperature=1.5))
    assert torch.autograd.gradcheck(
        lambda z: loss(token_inputs(z, teacher, [1, 0, 3])), randn(3, 4, seed=8).requires_grad_()
    )


@pytest.mark.parametrize("config", [KDConfig(), KDConfig(kd_ratio=1), KDConfig(temperature=2, scale_by_t2=True)])
def test_a_token_that_the_teacher_excludes_costs_nothing(config: KDConfig) -> None:
    """0 · log 0/q = 0: the value and the gradient are those of a teacher with p a hair above 0."""
    student, excluded = randn(3, 4, seed=10), randn(3, 4, seed=11)
    excluded[:, 3] = -math.inf
    nearly = excluded.masked_fill(excluded == -math.inf, -600.0)
    results = []
    for teacher in (excluded, nearly):
        leaf = student.clone().requires_grad_()
        values = KDLoss(config)(token_inputs(leaf, teacher, [0, 1, 2]))
        values.sum().backward()
        results.append((values.detach(), leaf.grad))
    assert results[0][0].isfinite().all()
    torch.testing.assert_close(results[0], results[1])


def test_pure_kl_is_zero_at_match() -> None:
    logits = randn(3, 5, seed=9)
    assert PURE(token_inputs(logits, logits, [0, 1, 2])).abs().max() < 1e-15


@pytest.mark.parametrize("wrong", [{"kd_ratio": 1.5}, {"kd_ratio": -0.1}, {"kd_ratio": 0.0}, {"temperature": 0}])
def test_bounds(wrong: dict[str, float]) -> None:
    """A ratio of 0 is `sft`: it would load a teacher for nothing."""
    with pytest.raises(ValidationError):
        KDConfig(**wrong)
