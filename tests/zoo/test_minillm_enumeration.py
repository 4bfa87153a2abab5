"""`minillm` against exact enumeration: every response over three tokens, weighted by its probability."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from dpkd_zoo.minillm import MiniLLMConfig, MiniLLMLoss
from oracles import divergence, log_probs, returns
from torch import Tensor
from zoo_inputs import FLOAT64, randn, rollout_inputs

from dpkd.api import Rollout

EXACT = {"length_normalise": False, "clip_epsilon": None}
VOCABULARY, EOS, LONGEST = 3, 0, 3


def _sequences() -> list[tuple[int, ...]]:
    """Every response over three tokens that ends with EOS or at the third token."""
    full = itertools.product(range(VOCABULARY), repeat=LONGEST)
    cut = {y[: y.index(EOS) + 1] if EOS in y else y for y in full}
    return sorted(cut)


SEQUENCES = _sequences()
PREFIXES = sorted({y[:t] for y in SEQUENCES for t in range(len(y))})


def _gathered(logits: Tensor, sequences: list[tuple[int, ...]]) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of logits `[N, V]`, drawn ids and sequence numbers of all tokens; `logits` has a row for each prefix."""
    where = [PREFIXES.index(y[:t]) for y in sequences for t in range(len(y))]
    ids = [token for y in sequences for token in y]
    number = [i for i, y in enumerate(sequences) for _ in y]
    return logits[where], torch.tensor(ids), torch.tensor(number)


def _surrogate_gradient(config: MiniLLMConfig, student: Tensor, teacher: Tensor, alpha: float) -> Tensor:
    """The surrogate's gradient, expected over every response that α p + (1-α) q can draw."""
    theta = student.clone().requires_grad_()
    rows, ids, number = _gathered(theta, SEQUENCES)
    teacher_rows = _gathered(teacher, SEQUENCES)[0]
    old, reference = (z.detach().log_softmax(-1) for z in (rows, teacher_rows))
    mixed = (alpha * reference.exp() + (1 - alpha) * old.exp()).log()
    each = torch.arange(len(ids))
    rollout = Rollout(old[each, ids], mixed[each, ids], reference[each, ids], number)
    loss = MiniLLMLoss(config)
    advantages = loss.advantages(rollout)
    values = loss(rollout_inputs(rows, teacher_rows, ids, rollout.rollout_logps, rollout.behaviour_logps, advantages))
    log_drawn = torch.zeros(len(SEQUENCES), dtype=FLOAT64).index_add(0, number, rollout.behaviour_logps)
    assert log_drawn.exp().sum().item() == pytest.approx(1)
    (values * log_drawn.exp()[number]).sum().backward()
    assert theta.grad is not None
    return theta.grad


def _sequence_reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """Σ_y q(y) (log q(y) - log p(y)), by enumeration."""
    rows, ids, number = _gathered(student.log_softmax(-1), SEQUENCES)
    teacher_rows = _gathered(teacher.log_softmax(-1), SEQUENCES)[0]
    each = torch.arange(len(ids))
    zeros = torch.zeros(len(SEQUENCES), dtype=FLOAT64)
    log_q = zeros.index_add(0, number, rows[each, ids])
    log_p = zeros.index_add(0, number, teacher_rows[each, ids])
    return (log_q.exp() * (log_q - log_p)).sum()


def test_the_enumeration_has_responses_of_all_lengths() -> None:
    assert {len(y) for y in SEQUENCES} == {1, 2, 3}
    assert len(SEQUENCES) == 1 + 2 + 4 * 3


@pytest.mark.parametrize("seed", range(3))
def test_expected_gradient_is_that_of_the_sequence_level_reverse_kl(seed: int) -> None:
    student, teacher = randn(len(PREFIXES), 3, seed=seed), randn(len(PREFIXES), 3, seed=seed + 10)
    theta = student.clone().requires_grad_()
    _sequence_reverse_kl(theta, teacher).backward()
    surrogate = _surrogate_gradient(MiniLLMConfig(**EXACT), student, teacher, alpha=0.0)
    torch.testing.assert_close(surrogate, theta.grad, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize(
    "wrong",
    [
        {"single_step_weight": 0.0},
        {"discount": 0.5},
        {"length_normalise": True},
        {"reward_scale": 2.0},
        {"include_current": True},  # r_t ∇log q is the single-step part again, sampled: it counts twice
        {"whiten": "rows"},
        {"reward_clip": 0.1},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_other_settings_have_another_gradient(wrong: dict[str, Any]) -> None:
    """The enumeration sees each part: none of these reproduces the sequence-level gradient."""
    student, teacher = randn(len(PREFIXES), 3, seed=0), randn(len(PREFIXES), 3, seed=10)
    theta = student.clone().requires_grad_()
    _sequence_reverse_kl(theta, teacher).backward()
    surrogate = _surrogate_gradient(MiniLLMConfig(**{**EXACT, **wrong}), student, teacher, alpha=0.0)
    assert theta.grad is not None
    assert (surrogate - theta.grad).abs().max() > 1e-3


def test_current_reward_is_an_unbiased_substitute_for_the_single_step_part() -> None:
    """Eq. 2 against Eq. 3: R_t without the single-step part has the same expectation as R_{t+1} with it."""
    student, teacher = randn(len(PREFIXES), 3, seed=1), randn(len(PREFIXES), 3, seed=11)
    sampled = MiniLLMConfig(**EXACT, single_step_weight=0.0, include_current=True)
    torch.testing.assert_close(
        _surrogate_gradient(sampled, student, teacher, alpha=0.0),
        _surrogate_gradient(MiniLLMConfig(**EXACT), student, teacher, alpha=0.0),
    )


def _equation_7(student: list[list[float]], teacher: list[list[float]], alpha: float, normalise: bool) -> np.ndarray:
    """Σ_y p̃(y) Σ_t w_t [∇KL(q‖p) - R_{t+1} ∇log q(y_t)] with w_t = q/p̃ of token t alone (Eq. 5), in loops."""
    log_q, log_p = [log_probs(row) for row in student], [log_probs(row) for row in teacher]
    gradient = np.zeros((len(PREFIXES), VOCABULARY))
    for y in SEQUENCES:
        where = [PREFIXES.index(y[:t]) for t in range(len(y))]
        q = [math.exp(log_q[i][v]) for i, v in zip(where, y, strict=True)]
        p = [math.exp(log_p[i][v]) for i, v in zip(where, y, strict=True)]
        drawn = [alpha * b + (1 - alpha) * a for a, b in zip(q, p, strict=True)]
        later = returns([math.log(b / a) for a, b in zip(q, p, strict=True)], normalise=normalise)
        for t, i in enumerate(where):
            distance = divergence(log_q[i], log_p[i])
            for v in range(VOCABULARY):
                q_v = math.exp(log_q[i][v])
                single = q_v * (log_q[i][v] - log_p[i][v] - distance)
                long = later[t] * ((v == y[t]) - q_v)
                gradient[i, v] += math.prod(drawn) * q[t] / drawn[t] * (single - long)
    return gradient


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("alpha", [0.0, 0.2])
def test_expected_gradient_under_teacher_mixed_sampling_is_equation_7(alpha: float, normalise: bool) -> None:
    """Over every response, each with the probability that the mixture writes it."""
    student, teacher = randn(len(PREFIXES), 3, seed=4), randn(len(PREFIXES), 3, seed=14)
    config = MiniLLMConfig(clip_epsilon=None, length_normalise=normalise)
    surrogate = _surrogate_gradient(config, student, teacher, alpha)
    expected = _equation_7(student.tolist(), teacher.tolist(), alpha, normalise)
    np.testing.assert_allclose(surrogate.numpy(), expected, atol=1e-12)
