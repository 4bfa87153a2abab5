"""`sampled-kl`: unbiased by enumeration of all draws, draws as distributed, and the same every time."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from dpkd_zoo.sampled_kl import SPEC, SampledKLConfig, SampledKLLoss, draw, estimate, uniforms
from oracles_token import divergence, softmax
from scipy import stats
from token_helpers import logs, out, value
from torch import Tensor
from zoo_inputs import randn

from dpkd.testing import check_loss


def _reference(*, student_logits: Any, teacher_logits: Any, config: SampledKLConfig) -> Any:
    """The numbers that the draws are made from are the loss's own; all else is loops."""
    numbers = uniforms(torch.from_numpy(teacher_logits).log_softmax(-1), config.samples, config.seed).tolist()
    return np.array(
        [
            _one(z_p, z_q, row, config.power)
            for z_p, z_q, row in zip(teacher_logits, student_logits, numbers, strict=True)
        ]
    )


def _one(z_p: Any, z_q: Any, numbers: list[float], power: float) -> float:
    p, q = softmax(z_p.tolist()), softmax(z_q.tolist())
    r = [x**power / sum(y**power for y in p) for x in p]
    total = 0.0
    for u in numbers:
        v = next(v for v in range(len(r)) if sum(r[: v + 1]) > u or v == len(r) - 1)
        total += p[v] / r[v] * (math.log(p[v] / q[v]) if q[v] > 0 else math.inf)
    return total / len(numbers)


@pytest.mark.parametrize("settings", [{}, {"samples": 1}, {"samples": 7, "power": 0.5, "seed": 3}, {"power": 1.5}])
def test_conforms_and_equals_loops(settings: dict[str, float]) -> None:
    check_loss(SPEC, config=settings, reference=_reference)


def _log_r(log_p: Tensor, power: float) -> Tensor:
    return (power * log_p).log_softmax(-1)


@pytest.mark.parametrize("power", [1.0, 0.5, 2.0])
def test_value_and_gradient_are_unbiased(power: float) -> None:
    """All 4³ draws of three tokens, each with its probability: the mean is KL(p‖q), its gradient q - p."""
    student, teacher = randn(1, 4, seed=1, scale=1.0), randn(1, 4, seed=2, scale=1.0)
    log_p = teacher.log_softmax(-1)
    log_r = _log_r(log_p, power)
    leaf = student.clone().requires_grad_()
    mean = torch.zeros(1, dtype=torch.float64)
    for ids in itertools.product(range(4), repeat=3):
        probability = math.exp(sum(log_r[0, v].item() for v in ids))
        mean = mean + probability * estimate(log_p, leaf.log_softmax(-1), log_r, torch.tensor([ids]))
    mean.sum().backward()
    assert mean.item() == pytest.approx(divergence(softmax(teacher[0].tolist()), softmax(student[0].tolist())))
    torch.testing.assert_close(leaf.grad, student.softmax(-1) - teacher.softmax(-1))


def test_drawn_tokens_are_distributed_as_r() -> None:
    """An even grid of numbers gives each token its share, and an excluded token none, at either end of the row."""
    log_r = logs([0.0, 0.5, 0.125, 0.0, 0.375, 0.0])
    grid = (torch.arange(64, dtype=torch.float64) / 64).unsqueeze(0)
    counts = torch.bincount(draw(log_r, grid)[0], minlength=6)
    assert counts.tolist() == [0, 32, 8, 0, 24, 0]


def test_the_numbers_are_even_over_draws_positions_and_seeds() -> None:
    """A chi-squared test on 20 bins of each, and no correlation between neighbours."""
    many = [
        uniforms(randn(1, 50, seed=1), 4000, 0)[0],
        uniforms(randn(4000, 50, seed=2), 1, 0)[:, 0],
        torch.cat([uniforms(randn(1, 50, seed=3), 1, seed)[0] for seed in range(1000)]),
    ]
    for numbers in many:
        assert 0 <= numbers.min() < 0.01
        assert 0.99 < numbers.max() < 1
        counts = torch.histc(numbers, 20, 0, 1)
        assert stats.chisquare(counts.numpy()).pvalue > 1e-3
        assert abs(np.corrcoef(numbers[1:], numbers[:-1])[0, 1]) < 0.1


def test_over_many_seeds_the_mean_is_the_kl() -> None:
    student, teacher = randn(1, 5, seed=1, scale=1.0), randn(1, 5, seed=2, scale=1.0)
    for power in (1.0, 0.6):
        losses = [SampledKLLoss(SampledKLConfig(samples=20, seed=seed, power=power)) for seed in range(400)]
        found = torch.stack([value(loss, student, teacher)[0] for loss in losses])
        expected = divergence(softmax(teacher[0].tolist()), softmax(student[0].tolist()))
        assert abs(found.mean().item() - expected) < 4 * found.std().item() / 20


def test_the_draw_depends_on_the_seed_and_on_the_teachers_first_tokens_only() -> None:
    teacher = randn(3, 9, seed=4)
    first = uniforms(teacher, 6, 0)
    assert torch.equal(uniforms(2 * teacher - 5, 6, 0), first)
    assert torch.equal(uniforms(teacher[1:2], 6, 0), first[1:2])
    assert torch.equal(uniforms(teacher, 9, 0)[:, :6], first)
    assert (uniforms(teacher, 6, 1) != first).all()
    assert (first[0] != first[1]).all()
    two = teacher.clone()
    order = teacher.argsort(descending=True)
    two[0, order[0, 0]], two[0, order[0, 1]] = teacher[0, order[0, 1]], teacher[0, order[0, 0]]
    assert (uniforms(two, 6, 0)[0] != first[0]).all()


def test_excluded_tokens_do_not_change_the_draw() -> None:
    """Two tokens are left of three: those without mass come in no order, and in any number."""
    narrow = out(randn(2, 3, seed=5), 1)
    wide = torch.cat([narrow, torch.full((2, 4), -math.inf, dtype=torch.float64)], 1)
    assert torch.equal(uniforms(narrow.log_softmax(-1), 5, 0), uniforms(wide.log_softmax(-1), 5, 0))
