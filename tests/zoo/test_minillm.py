"""`minillm`: rewards and returns by hand, the clipping, and the gradient token by token."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from dpkd_zoo.minillm import SPEC, MiniLLMConfig, MiniLLMLoss
from oracles import divergence, log_probs, returns
from torch import Tensor
from zoo_inputs import FLOAT64, one_sequence, randn, rollout_inputs

from dpkd.api import Rollout, Signal, TeacherAccess


def test_gradient_of_each_token_under_teacher_mixed_sampling_is_equation_7() -> None:
    """Row by row: w [q (log q/p - KL) - R (onehot - q)] with w = q/p̃, written out in loops."""
    student, teacher, targets = randn(4, 3, seed=2), randn(4, 3, seed=3), [2, 0, 1, 1]
    advantages = [0.7, -1.2, 0.0, 2.0]
    expected, behaviour, old = [], [], []
    for z_q, z_p, y, advantage in zip(student.tolist(), teacher.tolist(), targets, advantages, strict=True):
        log_q, log_p = log_probs(z_q), log_probs(z_p)
        drawn = 0.2 * math.exp(log_p[y]) + 0.8 * math.exp(log_q[y])
        w, distance = math.exp(log_q[y]) / drawn, divergence(log_q, log_p)
        expected.append(
            [
                w * (math.exp(log_q[v]) * (log_q[v] - log_p[v] - distance))
                - w * advantage * ((v == y) - math.exp(log_q[v]))
                for v in range(3)
            ]
        )
        behaviour.append(math.log(drawn))
        old.append(log_q[y])
    student.requires_grad_()
    numbers = [torch.tensor(n, dtype=FLOAT64) for n in (old, behaviour, advantages)]
    values = MiniLLMLoss(MiniLLMConfig(clip_epsilon=None))(
        rollout_inputs(student, teacher, torch.tensor(targets), *numbers)
    )
    values.sum().backward()
    torch.testing.assert_close(student.grad, torch.tensor(expected, dtype=FLOAT64))


def test_single_step_part_can_go_without_importance_weights() -> None:
    """Released form: full-vocabulary KL(q‖p) with weight 1, beside the weighted long part."""
    student, teacher, targets = randn(3, 4, seed=4), randn(3, 4, seed=5), torch.tensor([0, 1, 2])
    old = student.log_softmax(-1)[torch.arange(3), targets]
    x = rollout_inputs(student, teacher, targets, old, old - 0.2, torch.zeros(3, dtype=FLOAT64))
    expected = [divergence(log_probs(q), log_probs(p)) for q, p in zip(student.tolist(), teacher.tolist(), strict=True)]
    released = MiniLLMLoss(MiniLLMConfig(weigh_single_step=False))(x)
    assert released.tolist() == pytest.approx(expected)
    paper = MiniLLMLoss(MiniLLMConfig())(x)
    assert paper.tolist() == pytest.approx([math.exp(0.2) * e for e in expected])
    quarter = MiniLLMLoss(MiniLLMConfig(single_step_weight=0.25))(x)
    assert quarter.tolist() == pytest.approx([math.exp(0.2) * 0.25 * e for e in expected])


@pytest.mark.parametrize(
    ("advantage", "ratio", "value", "alive"),
    [
        (1.0, 1.5, -1.2, False),  # gains end at 1 + ε
        (1.0, 0.5, -0.5, True),
        (-1.0, 0.5, 0.8, False),  # and at 1 - ε
        (-1.0, 1.5, 1.5, True),  # losses do not
        (2.0, 1.1, -2.2, True),
    ],
)
def test_ppo_clipping(advantage: float, ratio: float, value: float, alive: bool) -> None:
    student = torch.tensor([[0.3, 0.0, -0.5]], dtype=FLOAT64, requires_grad=True)
    drawn = student.detach().log_softmax(-1)[:, 1] - math.log(ratio)
    x = rollout_inputs(
        student, student.detach(), torch.tensor([1]), drawn, drawn, torch.tensor([advantage], dtype=FLOAT64)
    )
    result = MiniLLMLoss(MiniLLMConfig(single_step_weight=0.0))(x)
    result.sum().backward()
    assert result.item() == pytest.approx(value)
    assert student.grad is not None
    assert (student.grad.abs().max().item() > 0) == alive


REWARDS = [1.0, 2.0, 4.0]
TEACHER = [-0.5, -0.25, -0.125]
OLD = [t - r for t, r in zip(TEACHER, REWARDS, strict=True)]


def test_returns_by_hand() -> None:
    """Rewards 1, 2, 4: what follows the first token is 6 over 2 tokens, the second 4, the last nothing."""
    rollout = one_sequence(OLD, TEACHER)
    assert MiniLLMLoss(MiniLLMConfig()).advantages(rollout).tolist() == pytest.approx([3, 4, 0])
    plain = MiniLLMLoss(MiniLLMConfig(length_normalise=False)).advantages(rollout)
    assert plain.tolist() == pytest.approx([6, 4, 0])
    current = MiniLLMLoss(MiniLLMConfig(length_normalise=False, include_current=True)).advantages(rollout)
    assert current.tolist() == pytest.approx([7, 6, 4])


@pytest.mark.parametrize("discount", [1.0, 0.95])
@pytest.mark.parametrize("include_current", [False, True])
@pytest.mark.parametrize("normalise", [False, True])
def test_returns_equal_loops_and_stay_within_their_sequence(
    discount: float, include_current: bool, normalise: bool
) -> None:
    lengths = [3, 1, 5, 2]
    teacher, old = randn(sum(lengths), seed=6), randn(sum(lengths), seed=7)
    number = torch.tensor([i for i, n in enumerate(lengths) for _ in range(n)])
    expected, start = [], 0
    for n in lengths:
        rewards = [(teacher[i] - old[i]).item() for i in range(start, start + n)]
        expected += returns(rewards, discount=discount, include_current=include_current, normalise=normalise)
        start += n
    config = MiniLLMConfig(discount=discount, include_current=include_current, length_normalise=normalise)
    values = MiniLLMLoss(config).advantages(Rollout(old, old, teacher, number))
    assert values.tolist() == pytest.approx(expected)


def test_rewards_are_scaled_then_clipped() -> None:
    """Rewards 1, 2, 4 over 0.5 are 2, 4, 8; clipped at 5: 2, 4, 5."""
    config = MiniLLMConfig(reward_scale=0.5, reward_clip=5.0, length_normalise=False)
    assert MiniLLMLoss(config).advantages(one_sequence(OLD, TEACHER)).tolist() == pytest.approx([9, 5, 0])


def test_whitening() -> None:
    values = MiniLLMLoss(MiniLLMConfig(whiten="rows")).advantages(one_sequence(OLD, TEACHER))
    assert values.mean().item() == pytest.approx(0, abs=1e-9)
    assert values.pow(2).mean().item() == pytest.approx(1, abs=1e-6)
    order = MiniLLMLoss(MiniLLMConfig()).advantages(one_sequence(OLD, TEACHER))
    assert values.argsort().tolist() == order.argsort().tolist()


def test_released_whitening_is_that_of_the_padded_rectangle() -> None:
    """By NumPy, from its description: a row per response, zeros to the longest, `var` with ddof = 1."""
    lengths = [3, 1, 5, 2]
    teacher, old = randn(sum(lengths), seed=8), randn(sum(lengths), seed=9)
    rollout = Rollout(old, old, teacher, torch.tensor([i for i, n in enumerate(lengths) for _ in range(n)]))
    plain = MiniLLMLoss(MiniLLMConfig()).advantages(rollout).numpy()
    ends = np.cumsum(lengths)
    rectangle = np.stack(
        [np.pad(plain[end - n : end], (0, max(lengths) - n)) for n, end in zip(lengths, ends, strict=True)]
    )
    expected = (plain - rectangle.mean()) / np.sqrt(rectangle.var(ddof=1) + 1e-8)
    values = MiniLLMLoss(MiniLLMConfig(whiten="released")).advantages(rollout)
    np.testing.assert_allclose(values.numpy(), expected, rtol=1e-12)
    # With padding it is another number than over the tokens alone.
    rows = MiniLLMLoss(MiniLLMConfig(whiten="rows")).advantages(rollout).numpy()
    assert np.abs(rows - expected).max() > 0.05


def test_released_whitening_of_one_token_is_finite() -> None:
    assert MiniLLMLoss(MiniLLMConfig(whiten="released")).advantages(one_sequence([-1.0], [-3.0])).tolist() == [0]


@pytest.mark.parametrize(("old", "now"), [(True, "rows"), (False, "none")])
def test_the_old_switch_is_translated_with_a_warning(old: bool, now: str) -> None:
    with pytest.warns(FutureWarning, match=f"is now loss.whiten={now}"):
        assert MiniLLMConfig(whiten=old).whiten == now


def test_a_constant_return_whitens_to_zero() -> None:
    values = MiniLLMLoss(MiniLLMConfig(whiten="rows")).advantages(one_sequence([-1.0, -1.0], [-1.0, -1.0]))
    assert values.tolist() == [0, 0]


def test_a_token_that_the_teacher_excludes_gives_no_nan() -> None:
    rollout = one_sequence([-1.0, -1.0, -1.0], [-1.0, -math.inf, -2.0])
    values = MiniLLMLoss(MiniLLMConfig()).advantages(rollout)
    assert values.tolist() == [-math.inf, -1, 0]
    clipped = MiniLLMLoss(MiniLLMConfig(reward_clip=100.0)).advantages(rollout)
    assert clipped.tolist() == pytest.approx([-50.5, -1, 0])


def test_empty_collection() -> None:
    for whiten in ("none", "rows", "released"):
        nothing = one_sequence([], [])
        assert MiniLLMLoss(MiniLLMConfig(whiten=whiten)).advantages(nothing).shape == (0,)


def test_advantages_carry_no_gradient() -> None:
    old = torch.tensor([-1.0, -2.0], requires_grad=True)
    rollout = Rollout(old, old, torch.tensor([-1.5, -1.0]), torch.zeros(2, dtype=torch.long))
    assert not MiniLLMLoss(MiniLLMConfig()).advantages(rollout).requires_grad


def test_a_ratio_beyond_the_floats_stays_finite() -> None:
    """The student now certain of a token that it could hardly draw before."""
    student = torch.tensor([[200.0, 0.0], [200.0, 0.0]], requires_grad=True)
    old = torch.tensor([-200.0, -200.0])
    x = rollout_inputs(student, torch.zeros(2, 2), torch.tensor([0, 0]), old, old, torch.tensor([0.0, -1.0]))
    values = MiniLLMLoss(MiniLLMConfig())(x)
    values.sum().backward()
    assert values.isfinite().all()
    assert student.grad is not None
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("settings", [{}, {"clip_epsilon": None}, {"weigh_single_step": False}])
def test_gradcheck(settings: dict[str, Any]) -> None:
    teacher, targets = randn(4, 3, seed=8), torch.tensor([0, 1, 2, 0])
    theta = randn(4, 3, seed=9)
    old = theta.log_softmax(-1)[torch.arange(4), targets]
    advantages = randn(4, seed=10)
    loss = MiniLLMLoss(MiniLLMConfig(**settings))

    def value(z: Tensor) -> Tensor:
        return loss(rollout_inputs(z, teacher, targets, old, old - 0.1, advantages))

    assert torch.autograd.gradcheck(value, theta.requires_grad_())


def test_logits_are_not_needed_without_the_single_step_part() -> None:
    assert SPEC.needs() is TeacherAccess.LOGITS
    without = MiniLLMConfig(single_step_weight=0.0)
    assert SPEC.needs(without) is TeacherAccess.TOKEN_LOGPS
    assert Signal.TEACHER_LOGITS not in SPEC.signals(without)


def test_suggests_the_papers_sampling_and_the_scripts_optimiser() -> None:
    assert SPEC.suggests["text"] == {
        "source": "student",
        "teacher_mix": 0.2,
        "refresh": "every_n_steps",
        "every": 4,
        "num_iterations": 4,
    }
    assert SPEC.suggests["student"] == {"dropout": "off"}
    assert SPEC.suggests["train"] == {
        "lr": 5e-6,
        "schedule": "constant",
        "warmup_steps": 100,
        "betas": [0.9, 0.95],
        "weight_decay": 1e-6,
    }


@pytest.mark.parametrize(
    "wrong", [{"discount": 0}, {"clip_epsilon": 1}, {"reward_scale": 0}, {"single_step_weight": -1}]
)
def test_bounds(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="Input should be"):
        MiniLLMConfig(**wrong)
