"""Checks of promises: each runs on losses that make it. N rows, K columns of the student."""

from __future__ import annotations

import torch

from dpkd.api import Family, RolloutLoss, Signal, Trait
from dpkd.testing.inputs import EXCLUDED, SampleBatch, matched, rollout_of
from dpkd.testing.subject import FOUNDATION, WITH_GRADIENT, Check, LossUnderTest, require, require_close

SEEDS = 20


def zero_at_match(subject: LossUnderTest) -> None:
    """Student = teacher: the value is 0, and so is the gradient."""
    for seed in range(3):
        values_N, gradient_NK = subject.evaluate(_at_match(subject, seed))
        require_close(
            values_N,
            torch.zeros_like(values_N),
            "the value is not 0 where the student equals the teacher: a cross-entropy where a divergence is meant?",
        )
        _require_no_gradient(gradient_NK)


def stationary_at_match(subject: LossUnderTest) -> None:
    """Student = teacher: the gradient is 0, whatever the value."""
    for seed in range(3):
        _require_no_gradient(subject.evaluate(_at_match(subject, seed))[1])


def _require_no_gradient(gradient_NK: torch.Tensor) -> None:
    require_close(
        gradient_NK,
        torch.zeros_like(gradient_NK),
        "the gradient is not 0 where the student equals the teacher: training would leave the optimum",
    )


def _at_match(subject: LossUnderTest, seed: int) -> SampleBatch:
    batch = matched(subject.batch(seed=seed))
    loss = subject.build()
    if isinstance(loss, RolloutLoss):
        batch = batch.having(Signal.ADVANTAGES, loss.advantages(rollout_of(batch)).detach())
    return batch


def non_negative(subject: LossUnderTest) -> None:
    """No value below 0, over many seeds and scales."""
    loss = subject.build()
    for seed in range(SEEDS):
        scale = (0.1, 1.0, 4.0)[seed % 3]
        lowest = subject.values(subject.batch(seed=seed, scale=scale), loss).min().item()
        require(
            lowest >= -1e-6, f"a value of {lowest:.6g} at seed {seed}, scale {scale:g}: the sign or direction is wrong?"
        )


def shift_invariant(subject: LossUnderTest) -> None:
    """A constant added to all logits of a position, another for each model and position, changes nothing."""
    generator = torch.Generator().manual_seed(13)
    for seed in range(3):
        batch = subject.batch(seed=seed)
        shifted = batch
        for signal in (Signal.STUDENT_LOGITS, Signal.TEACHER_LOGITS):
            constant_N1 = 3 * torch.randn(len(batch), 1, generator=generator)
            logits_NV = batch.signals[signal]
            assert isinstance(logits_NV, torch.Tensor)
            shifted = shifted.having(signal, logits_NV + constant_N1)
        require_close(
            subject.values(shifted),
            subject.values(batch),
            "a constant added to all logits of a position changes the value: logits are used without a softmax",
            rtol=1e-3,
        )


def linear_in_the_teacher(subject: LossUnderTest) -> None:
    """The gradient under the mean of two teachers is the mean of the gradients under each: samples will do."""
    for seed in range(3):
        batch, other = subject.batch(seed=seed), subject.batch(seed=seed + 100)
        one, two = (b.signals[Signal.TEACHER_LOGITS] for b in (batch, other))
        assert isinstance(one, torch.Tensor)
        assert isinstance(two, torch.Tensor)
        mean = (0.5 * one.softmax(-1) + 0.5 * two.softmax(-1)).log()
        gradients = [subject.evaluate(batch.having(Signal.TEACHER_LOGITS, p))[1] for p in (one, two, mean)]
        require_close(
            gradients[2],
            0.5 * gradients[0] + 0.5 * gradients[1],
            "the gradient is not linear in the teacher's probabilities: samples of them would bias it",
        )


def finite_with_two_vocabularies(subject: LossUnderTest) -> None:
    """Each model has tokens that the other has not (logits of -inf): value and gradient are finite all the same."""
    for seed in range(3):
        batch = subject.batch(seed=seed, student_excludes=EXCLUDED)
        teacher_NV = batch.teacher.clone()
        teacher_NV[:, :EXCLUDED] = -torch.inf
        values_N, gradient_NK = subject.evaluate(batch.having(Signal.TEACHER_LOGITS, teacher_NV))
        for what, numbers in (("values", values_N), ("gradients", gradient_NK)):
            bad = int((~numbers.isfinite()).sum())
            require(
                bad == 0,
                f"{bad} of {numbers.numel()} {what} are not finite where student and teacher have different "
                "vocabularies: compare tokens only where both models have them",
            )


CHECKS = (
    Check(zero_at_match, trait=Trait.ZERO_AT_MATCH, requires=WITH_GRADIENT),
    Check(stationary_at_match, trait=Trait.STATIONARY_AT_MATCH, requires=WITH_GRADIENT),
    Check(
        linear_in_the_teacher, families=frozenset({Family.TOKEN}), trait=Trait.LINEAR_IN_TEACHER, requires=WITH_GRADIENT
    ),
    Check(
        finite_with_two_vocabularies,
        families=frozenset({Family.TOKEN}),
        trait=Trait.ACROSS_TOKENIZERS,
        requires=WITH_GRADIENT,
    ),
    Check(non_negative, trait=Trait.NON_NEGATIVE, requires=FOUNDATION),
    Check(
        shift_invariant,
        families=frozenset({Family.TOKEN, Family.ROLLOUT}),
        trait=Trait.SHIFT_INVARIANT,
        requires=FOUNDATION,
    ),
)
