"""Checks of what a loss returns: one value per row, from that row alone, always the same. N rows, V vocabulary."""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from torch import Tensor

from dpkd.api import Family, Signal, TokenInputs
from dpkd.api.inputs import TOKEN_LOGPS
from dpkd.functional import KLSum, log_softmax
from dpkd.testing.inputs import EXCLUDED, SampleBatch
from dpkd.testing.results import CheckSkipped
from dpkd.testing.subject import FOUNDATION, WITH_GRADIENT, Check, LossUnderTest, require, require_close

LOGITS = frozenset({Family.TOKEN, Family.ROLLOUT})
EXCLUSIONS = (
    (EXCLUDED, EXCLUDED, "both models exclude"),
    (0, EXCLUDED, "the teacher excludes"),
    (EXCLUDED, 0, "the student excludes"),
)


def one_value_per_position(subject: LossUnderTest) -> None:
    """N rows give a float32 result of shape `[N]`, for one row too."""
    for rows in (6, 2, 1):
        values_N = subject.values(subject.batch(rows))
        found = str(values_N.dtype).removeprefix("torch.")
        require(values_N.dtype is torch.float32, f"float32 inputs gave a {found} result, expected float32")
        bad = int((~values_N.isfinite()).sum())
        require(bad == 0, f"{bad} of {rows} values are not finite on ordinary inputs")


def deterministic(subject: LossUnderTest) -> None:
    """No random numbers, and nothing remembered from one call to the next."""
    batch, other = subject.batch(seed=1), subject.batch(3, seed=2)
    loss = subject.build()
    first_N = _seeded(subject, batch, loss, 1)
    require_close(
        _seeded(subject, batch, loss, 2),
        first_N,
        "the same rows gave another value under another random seed",
        atol=0,
        rtol=0,
    )
    _seeded(subject, other, loss, 1)
    for again, what in ((loss, "after a call with other rows"), (subject.build(), "from a new instance")):
        require_close(
            _seeded(subject, batch, again, 1),
            first_N,
            f"the same rows gave another value {what}: the loss remembers",
            atol=0,
            rtol=0,
        )


def _seeded(subject: LossUnderTest, batch: SampleBatch, loss: torch.nn.Module, seed: int) -> Tensor:
    """Values under a seed of every usual generator, whose states are put back."""
    state = random.getstate()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        random.seed(seed)
        try:
            return subject.values(batch, loss)  # type: ignore[arg-type]
        finally:
            random.setstate(state)


def no_positions(subject: LossUnderTest) -> None:
    """No rows give no values: shape `[0]`, a sum of exactly 0, and a backward that works."""
    empty = subject.batch().take(slice(0, 0))
    student = empty.student.detach().clone().requires_grad_()
    total = subject.values(empty.with_student(student)).sum()
    require(total.item() == 0.0, f"no rows gave {total.item()}, expected 0: is there a mean inside?")
    require(
        total.requires_grad,
        "no rows gave a result without a graph, so that backward would fail: return the empty result of the same "
        "operations, not a new tensor",
    )
    total.backward()


def positions_are_independent(subject: LossUnderTest) -> None:
    """A row has the same value and gradient alone, among others, and in any order."""
    batch = subject.batch(seed=3)
    values_N, gradient_NK = subject.evaluate(batch)
    backwards = torch.arange(len(batch) - 1, -1, -1)
    parts: list[slice | Tensor] = [*(slice(i, i + 1) for i in range(len(batch))), slice(0, 3), slice(3, 6), backwards]
    for rows in parts:
        part_n, part_gradient_nK = subject.evaluate(batch.take(rows))
        hint = "a row depends on the other rows: is there a mean, a normalisation or a sum over rows in the loss?"
        require_close(part_n, values_N[rows], f"values differ when the batch is cut; {hint}")
        require_close(part_gradient_nK, gradient_NK[rows], f"gradients differ when the batch is cut; {hint}")


def inputs_are_left_alone(subject: LossUnderTest) -> None:
    """Nothing that others still read is changed in place: inputs, and log-probabilities shared with other terms."""
    batch = subject.batch(seed=4)
    student = batch.student.clone().requires_grad_()
    cache: dict[tuple[Signal, float], Tensor] = {}
    x = batch.with_student(student).inputs(subject.reads, cache)
    subject.build()(x).sum().backward()
    kept = batch.signals
    for signal, given in x._signals.items():
        original = kept[signal]
        pairs = [(given, original)] if isinstance(original, Tensor) else list(zip(given, original, strict=True))
        for now, before in pairs:
            require(
                torch.equal(now.detach(), before), f"the loss changes {signal.value!r} in place: others read it too"
            )
            flagged = now.is_leaf and now.requires_grad
            require(not flagged, f"the loss turns the gradient of {signal.value!r} on")
    for (signal, temperature), now in cache.items():
        logits = kept[signal]
        assert isinstance(logits, Tensor)
        unchanged = torch.equal(now.detach(), log_softmax(logits, temperature))
        require(
            unchanged, f"the loss changes the log-probabilities of {signal.value!r} in place: other terms read them"
        )


def finite_on_extreme_logits(subject: LossUnderTest) -> None:
    """Values and gradients are finite at a logit scale (for pairs: nats per token) of 1e-4, 50 and 1e4."""
    for scale in (1e-4, 50.0, 1e4):
        values_N, gradient_NK = subject.evaluate(subject.batch(8, seed=5, scale=scale))
        for what, numbers in (("values", values_N), ("gradients", gradient_NK)):
            bad = int((~numbers.isfinite()).sum())
            require(
                bad == 0,
                f"{bad} of {numbers.numel()} {what} are not finite at scale {scale:g}: work in log space "
                "(log_softmax, logaddexp, logsumexp, logsigmoid)",
            )


def excluded_tokens_give_no_nan(subject: LossUnderTest) -> None:
    """Logits of -inf: no NaN in a value, nor in a gradient where the value is finite.

    A value may be infinite where one model alone excludes a token; that it is so only where the formula says it is for
    `matches_reference` to see.
    """
    for student, teacher, who in EXCLUSIONS:
        batch = subject.batch(seed=6, student_excludes=student, teacher_excludes=teacher)
        logits_NK = batch.student.clone().requires_grad_()
        values_N = subject.values(batch.with_student(logits_NK))
        require(not bool(values_N.isnan().any()), f"a value is NaN where {who} a token (a logit of -inf): 0 · -inf?")
        finite_N = values_N.isfinite()
        if student and teacher:
            require(bool(finite_N.all()), f"a value is infinite where {who} the same tokens: they have no mass")
        values_N[finite_N].sum().backward()
        gradient = torch.zeros_like(logits_NK) if logits_NK.grad is None else logits_NK.grad
        require(
            not bool(gradient[finite_N].isnan().any()),
            f"a gradient is NaN where {who} a token and the value is finite: mask before the operation, not after",
        )


def bfloat16_inputs(subject: LossUnderTest) -> None:
    """bfloat16 logits or hidden states give what the same numbers give in float32: the loss works in float32."""
    half = subject.batch(seed=7).to(torch.bfloat16)
    values_N, gradient_NK = subject.evaluate(half)
    exact_N, exact_gradient_NK = subject.evaluate(half.to(torch.float32))
    found = str(values_N.dtype).removeprefix("torch.")
    require(values_N.dtype is torch.float32, f"bfloat16 inputs gave a {found} result, expected float32")
    hint = "read them through x.student_logits, x.student_log_probs() or x.student_hidden, which are float32"
    require_close(values_N, exact_N, f"bfloat16 inputs are not worked on in float32; {hint}", rtol=1e-3, atol=1e-4)
    # The gradient itself comes back in bfloat16: 8 bits.
    require_close(
        gradient_NK, exact_gradient_NK, f"the gradient in bfloat16 is far from float32; {hint}", rtol=2e-2, atol=1e-3
    )


def kl_sum_says_the_same(subject: LossUnderTest) -> None:
    """A loss that says it is a sum of KL divergences and a likelihood is it: fused kernels compute it in its place."""
    batch, loss = subject.batch(seed=8), subject.build()
    tell = getattr(loss, "kl_sum", None)
    terms: KLSum | None = None if tell is None else tell()
    if terms is None:
        raise CheckSkipped("it offers no `kl_sum`")
    expected_N = subject.values(batch, loss)
    x = batch.inputs(frozenset({Signal.STUDENT_LOGITS, Signal.TEACHER_LOGITS, Signal.TARGETS}))
    assert isinstance(x, TokenInputs)
    log_p_NV, log_q_NV = (f(terms.temperature) for f in (x.teacher_log_probs, x.student_log_probs))
    found_N = terms.value(log_p_NV, log_q_NV, x.targets)
    require_close(found_N, expected_N, "`kl_sum` is another value than `forward`")


def padding_changes_nothing(subject: LossUnderTest) -> None:
    """A wider batch gives the same values: behind the last token of a response there is nothing."""
    batch = subject.batch(seed=15)
    tokens = set(TOKEN_LOGPS.values())
    wider = batch.map(lambda signal, value: F.pad(value, (0, 3)) if signal in tokens else value)
    require_close(
        subject.values(wider),
        subject.values(batch),
        "values differ when the batch is wider: places behind a response's last token are read. Multiply by "
        "dpkd.functional.token_mask(x.lengths.chosen, T), and divide by x.lengths",
    )


CHECKS = (
    Check(one_value_per_position, requires=FOUNDATION[:1]),
    Check(deterministic, requires=FOUNDATION[:2]),
    Check(no_positions, requires=WITH_GRADIENT),
    Check(positions_are_independent, requires=WITH_GRADIENT),
    Check(inputs_are_left_alone, requires=WITH_GRADIENT),
    Check(padding_changes_nothing, families=frozenset({Family.PAIR}), tokens=True, requires=FOUNDATION),
    Check(finite_on_extreme_logits, requires=WITH_GRADIENT),
    Check(excluded_tokens_give_no_nan, families=LOGITS, logits=True, requires=WITH_GRADIENT),
    Check(bfloat16_inputs, families=LOGITS, requires=WITH_GRADIENT),
    Check(kl_sum_says_the_same, families=frozenset({Family.TOKEN}), logits=True, requires=WITH_GRADIENT),
)
