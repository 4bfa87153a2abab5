"""Random inputs of each family, as the engine would hand them over.

N rows (positions or pairs), V vocabulary. A `SampleBatch` shows the student as one matrix `[N, K]` whatever the family:
logits (K = V), hidden states of all layers one after the other, or the log-probs of the chosen and the rejected
response (K = 2), or those of their tokens where the loss reads these (K = 2T).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dpkd.api import HIDDEN, Family, Layers, Pair, PairInputs, Rollout, RolloutInputs, Signal, Stack, TokenInputs
from dpkd.api.inputs import TOKEN_LOGPS
from dpkd.functional import gather_logps, log_mix, token_mask
from dpkd.testing.results import CheckSkipped

VOCABULARY = 7
CHOSEN = 6  # tokens of the student that a loss may read as its likeliest
LONGEST = 9  # tokens of a response of a pair
EXCLUDED = 2  # so many of the last tokens may be excluded (logits of -inf); they are never targets
STUDENT_STACK, TEACHER_STACK = Stack(3, 4), Stack(6, 5)  # of losses on hidden states
TEACHER_MIX = 0.2  # share of the teacher in the policy that drew a rollout

Inputs = TokenInputs | PairInputs | RolloutInputs
Cache = dict[tuple[Signal, float], Tensor]
_KIND: dict[Family, type[Inputs]] = {Family.TOKEN: TokenInputs, Family.PAIR: PairInputs, Family.ROLLOUT: RolloutInputs}
_HALF = frozenset({Signal.STUDENT_LOGITS, Signal.TEACHER_LOGITS}) | HIDDEN  # what comes in half types too
_RESTS = (Signal.STUDENT_REST, Signal.TEACHER_REST)


@dataclass(frozen=True)
class InputShape:
    """Which hidden states a loss reads, and how wide those of student and teacher are."""

    layers: Layers
    student_width: int
    teacher_width: int


@dataclass(frozen=True)
class SampleBatch:
    """Every signal of a family, for N rows."""

    family: Family
    signals: Mapping[Signal, Tensor | Pair]

    def __len__(self) -> int:
        return len(self.student)

    @property
    def student(self) -> Tensor:
        """What the gradient is for, `[N, K]`."""
        return self._matrix(self._student_signal)

    @property
    def teacher(self) -> Tensor:
        """The teacher's counterpart, `[N, K]`."""
        if self.family is Family.PAIR:
            return self._matrix(self._of_tokens(Signal.TEACHER_LOGPS))
        hidden = Signal.TEACHER_HIDDEN in self.signals
        return self._matrix(Signal.TEACHER_HIDDEN if hidden else Signal.TEACHER_LOGITS)

    @property
    def _student_signal(self) -> Signal:
        if self.family is Family.PAIR:
            return self._of_tokens(Signal.STUDENT_LOGPS)
        return Signal.STUDENT_HIDDEN if Signal.STUDENT_HIDDEN in self.signals else Signal.STUDENT_LOGITS

    def _of_tokens(self, signal: Signal) -> Signal:
        """The signal of the single tokens, where the batch has these, of one of whole responses."""
        return TOKEN_LOGPS[signal] if TOKEN_LOGPS[signal] in self.signals else signal

    def _matrix(self, signal: Signal) -> Tensor:
        value = self.signals[signal]
        return (torch.stack(list(value), dim=1) if isinstance(value, Pair) else value).flatten(1)

    def with_student(self, student_NK: Tensor) -> SampleBatch:
        """The same rows under another student."""
        if self.family is Family.PAIR and self._student_signal is Signal.STUDENT_LOGPS:
            return self.having(Signal.STUDENT_LOGPS, Pair(student_NK[:, 0], student_NK[:, 1]))
        if self.family is Family.PAIR:
            tokens = _masked(student_NK.unflatten(1, (2, -1)).unbind(1), self.signals[Signal.LENGTHS])
            sums = Pair(*(logps_NT.sum(-1) for logps_NT in tokens))
            return self.having(Signal.STUDENT_TOKEN_LOGPS, tokens).having(Signal.STUDENT_LOGPS, sums)
        before = self.signals[self._student_signal]
        assert isinstance(before, Tensor)
        return self.having(self._student_signal, student_NK.unflatten(1, before.shape[1:]))

    def having(self, signal: Signal, value: Tensor | Pair) -> SampleBatch:
        """The same rows with one signal exchanged."""
        return replace(self, signals={**self.signals, signal: value})

    def map(self, change: Callable[[Signal, Tensor], Tensor]) -> SampleBatch:
        """Every tensor changed."""

        def changed(signal: Signal, value: Tensor | Pair) -> Tensor | Pair:
            if isinstance(value, Pair):
                return Pair(*(change(signal, v) for v in value))
            return change(signal, value)

        return replace(self, signals={s: changed(s, v) for s, v in self.signals.items()})

    def take(self, rows: slice | Tensor) -> SampleBatch:
        """Some of the rows."""
        return self.map(lambda _, value: value[rows])

    def to(self, dtype: torch.dtype) -> SampleBatch:
        """Numbers in another type; where it is a half type, logits and hidden states only, as in the engine."""
        half = dtype in (torch.bfloat16, torch.float16)

        def cast(signal: Signal, value: Tensor) -> Tensor:
            return value.to(dtype) if value.is_floating_point() and (signal in _HALF or not half) else value

        return self.map(cast)

    def inputs(self, reads: frozenset[Signal], cache: Cache | None = None) -> Inputs:
        """Fresh copies of what a loss declares: a change in place is not seen by the next call."""
        copies = self.map(lambda _, value: value.clone()).signals
        return _KIND[self.family]({s: v for s, v in copies.items() if s in reads}, cache)


def random_batch(
    family: Family,
    rows: int = 6,
    *,
    seed: int = 0,
    scale: float = 2.0,
    dtype: torch.dtype = torch.float32,
    student_excludes: int = 0,
    teacher_excludes: int = 0,
    hidden: InputShape | None = None,
    tokens: bool = False,
) -> SampleBatch:
    """Rows of a family; `scale` is the standard deviation of logits, or the size of log-probs per token in nats.

    With `hidden` the rows have hidden states in place of logits. With `tokens` pairs have log-probs of single tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    if family is Family.PAIR:
        return SampleBatch(family, _pairs(rows, scale, generator, tokens)).to(dtype)
    if hidden is not None:
        return SampleBatch(family, _hidden(rows, scale, hidden, generator)).to(dtype)
    student, teacher = (
        scale * torch.randn(rows, VOCABULARY, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    for logits, excluded in ((student, student_excludes), (teacher, teacher_excludes)):
        logits[:, VOCABULARY - excluded :] = -math.inf
    if family is Family.ROLLOUT:
        return SampleBatch(family, _drawn(student, teacher, generator)).to(dtype)
    targets = torch.randint(VOCABULARY - EXCLUDED, (rows,), generator=generator)
    signals = {
        Signal.STUDENT_LOGITS: student,
        Signal.TEACHER_LOGITS: teacher,
        Signal.TARGETS: targets,
        Signal.BY_STUDENT: torch.arange(rows) % 2 == 0,
        Signal.CHOSEN_IDS: student.topk(CHOSEN).indices,
        **{rest: _rest(rows, scale, generator) for rest in _RESTS},
    }
    return SampleBatch(family, signals).to(dtype)


def _hidden(rows: int, scale: float, shape: InputShape, generator: torch.Generator) -> dict[Signal, Tensor | Pair]:
    def states(layers: tuple[int, ...], width: int) -> Tensor:
        return scale * torch.randn(rows, len(layers), width, generator=generator, dtype=torch.float64)

    return {
        Signal.STUDENT_HIDDEN: states(shape.layers.student, shape.student_width),
        Signal.TEACHER_HIDDEN: states(shape.layers.teacher, shape.teacher_width),
        Signal.TARGETS: torch.randint(VOCABULARY, (rows,), generator=generator),
    }


def _rest(rows: int, scale: float, generator: torch.Generator) -> Tensor:
    """Log-probs `[N]` of up to two further tokens of a span, which half of the rows do not have."""
    more = torch.randint(-2, 3, (rows,), generator=generator).clamp(min=0)
    return -scale * more * torch.rand(rows, generator=generator, dtype=torch.float64)


def _pairs(rows: int, scale: float, generator: torch.Generator, tokens: bool) -> dict[Signal, Tensor | Pair]:
    lengths = Pair(*(torch.randint(1, LONGEST + 1, (rows,), generator=generator).double() for _ in range(2)))
    if tokens:
        return {Signal.LENGTHS: lengths, **_token_logps(lengths, scale, generator)}

    def logps() -> Pair:
        each = (torch.rand(rows, generator=generator, dtype=torch.float64) for _ in range(2))
        return Pair(*(-scale * n * share for n, share in zip(lengths, each, strict=True)))

    return {
        Signal.STUDENT_LOGPS: logps(),
        Signal.TEACHER_LOGPS: logps(),
        Signal.LENGTHS: lengths,
        Signal.REFERENCE_LOGPS: logps(),  # drawn last: what other losses see stays as it was
    }


def _token_logps(lengths: Pair, scale: float, generator: torch.Generator) -> dict[Signal, Tensor | Pair]:
    """Log-probs of single tokens, and their sums."""
    found: dict[Signal, Tensor | Pair] = {}
    for whole, each in TOKEN_LOGPS.items():
        shape = (2, len(lengths.chosen), LONGEST)
        logps = -scale * torch.rand(shape, generator=generator, dtype=torch.float64)
        tokens = _masked(logps.unbind(0), lengths)
        found |= {each: tokens, whole: Pair(*(logps_NT.sum(-1) for logps_NT in tokens))}
    return found


def _masked(logps: Sequence[Tensor], lengths: Tensor | Pair) -> Pair:
    """Log-probs `[N, T]` of two responses with 0 behind the end of each."""
    return Pair(*(v.masked_fill(~token_mask(n, v.shape[-1]), 0.0) for v, n in zip(logps, lengths, strict=True)))


def _drawn(student_NV: Tensor, teacher_NV: Tensor, generator: torch.Generator) -> dict[Signal, Tensor | Pair]:
    """Tokens really drawn, from a mix of the teacher and of a student a few steps old."""
    old_NV = student_NV + 0.1 * torch.randn(student_NV.shape, generator=generator, dtype=torch.float64)
    log_q_NV, log_p_NV = old_NV.log_softmax(-1), teacher_NV.log_softmax(-1)
    mixed_NV = log_mix(log_p_NV, log_q_NV, TEACHER_MIX)
    # The small number is for rows whose mass lies on tokens that may be excluded.
    share_NV = mixed_NV[:, : VOCABULARY - EXCLUDED].exp() + 1e-30
    targets_N = torch.multinomial(share_NV, 1, generator=generator).squeeze(-1)
    advantages_N = torch.randn(len(targets_N), generator=generator, dtype=torch.float64)
    return {
        Signal.STUDENT_LOGITS: student_NV,
        Signal.TEACHER_LOGITS: teacher_NV,
        Signal.TARGETS: targets_N,
        Signal.ROLLOUT_LOGPS: gather_logps(log_q_NV, targets_N),
        Signal.BEHAVIOUR_LOGPS: gather_logps(mixed_NV, targets_N),
        Signal.TEACHER_LOGPS: gather_logps(log_p_NV, targets_N),
        Signal.ADVANTAGES: advantages_N,
    }


def matched(batch: SampleBatch) -> SampleBatch:
    """The same rows with the student equal to the teacher, at the time of drawing too.

    Raises CheckSkipped where the two have other shapes.
    """
    if batch.student.shape != batch.teacher.shape:
        raise CheckSkipped("the hidden states of student and teacher have different shapes: they cannot be equal")
    batch = batch.with_student(batch.teacher)
    if batch.family is Family.TOKEN and Signal.TEACHER_REST in batch.signals:
        return batch.having(Signal.STUDENT_REST, batch.signals[Signal.TEACHER_REST])
    if batch.family is not Family.ROLLOUT:
        return batch
    for signal in (Signal.ROLLOUT_LOGPS, Signal.BEHAVIOUR_LOGPS):
        batch = batch.having(signal, batch.signals[Signal.TEACHER_LOGPS])
    return batch


def rollout_of(batch: SampleBatch) -> Rollout:
    """The rows of a rollout batch as one collection: responses of two tokens, two to a prompt."""
    logps = {s: batch.signals[s] for s in (Signal.ROLLOUT_LOGPS, Signal.BEHAVIOUR_LOGPS, Signal.TEACHER_LOGPS)}
    old, drawn, teacher = (v for v in logps.values() if isinstance(v, Tensor))
    responses_R = torch.arange(-(-len(batch) // 2))
    return Rollout(
        old,
        drawn,
        teacher,
        torch.arange(len(batch)) // 2,
        prompt=responses_R // 2,
        prompts=tuple(f"prompt {i // 2}" for i in responses_R.tolist()),
        responses=tuple(f"response {i}" for i in responses_R.tolist()),
        rewards=(responses_R + 1.0).cos().to(old.dtype),  # numbers of either sign
    )
