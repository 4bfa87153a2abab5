"""What a loss reads: signals by name, in the shapes of each family.

Shapes: N response positions, V vocabulary, B pairs, K layers, H hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple

from torch import Tensor

from dpkd.errors import warn_renamed
from dpkd.functional import at_least_float32, gather_logps, log_softmax


class Signal(StrEnum):
    """What a loss may read. It reads what its spec declares, and nothing else."""

    TARGETS = "targets"  # the response's token at each position [N]
    BY_STUDENT = "by_student"  # whether the student wrote the response that the position is in [N], bool
    STUDENT_LOGITS = "student_logits"  # [N, V]
    TEACHER_LOGITS = "teacher_logits"  # [N, V]
    CHOSEN_IDS = "chosen_ids"  # the student's likeliest tokens, likeliest first [N, K]: the teacher may know no others
    STUDENT_LOGPS = "student_logps"  # of whole responses, chosen and rejected [B]
    TEACHER_LOGPS = "teacher_logps"  # of whole responses [B]; in a RolloutLoss of the drawn tokens [N]
    REFERENCE_LOGPS = "reference_logps"  # of whole responses, under the student as it was at the start of the run [B]
    STUDENT_TOKEN_LOGPS = "student_token_logps"  # of each token of these responses [B, T], 0 behind the last
    TEACHER_TOKEN_LOGPS = "teacher_token_logps"  # the same under the teacher
    REFERENCE_TOKEN_LOGPS = "reference_token_logps"  # under the student as it was at the start of the run
    LENGTHS = "lengths"  # tokens of each response, EOS included [B]
    ADVANTAGES = "advantages"  # what RolloutLoss.advantages returned [N]
    REWARDS = "rewards"  # what `text.reward` gave each response [R]: in a RolloutLoss, for its advantages alone
    ROLLOUT_LOGPS = "rollout_logps"  # student log-prob of the token when it was sampled [N]
    BEHAVIOUR_LOGPS = "behaviour_logps"  # log-prob under the policy that drew it (a teacher mix, say) [N]
    STUDENT_REST = "student_rest"  # log-prob of a span's tokens after the first; 0 where tokenizers are the same [N]
    TEACHER_REST = "teacher_rest"  # the same under the teacher, in its own tokens [N]
    STUDENT_HIDDEN = "student_hidden"  # of the layers that TokenLoss.bind names [N, K, H]
    TEACHER_HIDDEN = "teacher_hidden"  # of the layers that TokenLoss.bind names [N, K, H]


# What a pair loss reads of whole responses, and the same token by token.
TOKEN_LOGPS = {
    Signal.STUDENT_LOGPS: Signal.STUDENT_TOKEN_LOGPS,
    Signal.TEACHER_LOGPS: Signal.TEACHER_TOKEN_LOGPS,
    Signal.REFERENCE_LOGPS: Signal.REFERENCE_TOKEN_LOGPS,
}
TEACHER_LOGPS = frozenset({Signal.TEACHER_LOGPS, Signal.TEACHER_TOKEN_LOGPS})
REFERENCE_LOGPS = frozenset({Signal.REFERENCE_LOGPS, Signal.REFERENCE_TOKEN_LOGPS})
# A loss that reads one of these gets whole micro-batches, and so no logits.
HIDDEN = frozenset({Signal.STUDENT_HIDDEN, Signal.TEACHER_HIDDEN})


class UndeclaredSignal(RuntimeError):
    """A loss read a signal that its spec does not declare."""


class Pair(NamedTuple):
    """One value for the `chosen` (y_t) and one for the `rejected` response (y_s) of each prompt, `[B]`."""

    chosen: Tensor
    rejected: Tensor

    @property
    def preferred(self) -> Tensor:
        """Deprecated name of `chosen`."""
        warn_renamed("Pair.preferred", "chosen")
        return self.chosen

    @property
    def dispreferred(self) -> Tensor:
        """Deprecated name of `rejected`."""
        warn_renamed("Pair.dispreferred", "rejected")
        return self.rejected


class Stack(NamedTuple):
    """The hidden states of a model, of one `width`: state 0 is the embedding, state `layers` is what the head reads."""

    layers: int
    width: int


class Layers(NamedTuple):
    """The hidden states of `student` and `teacher` that a loss reads, in the order in which its signals have them."""

    student: tuple[int, ...] = ()
    teacher: tuple[int, ...] = ()


class Part(NamedTuple):
    """Values of a part of a loss, for the log: of the rows `of` (bool); None: of all."""

    values: Tensor
    of: Tensor | None = None


class _Inputs:
    """Signals by name; reading one that was not declared raises UndeclaredSignal."""

    def __init__(self, signals: Mapping[Signal, Any], cache: dict[tuple[Signal, float], Tensor] | None = None) -> None:
        """Made by the engine from the `signals` that a loss declares; `cache` shares log-probs between losses."""
        # Always in one order: compiled code looks at it.
        self._signals = {signal: signals[signal] for signal in Signal if signal in signals}
        self._cache: dict[tuple[Signal, float], Tensor] = {} if cache is None else cache
        self.named_parts: dict[str, Part] = {}

    def part(self, name: str, values: Tensor, of: Tensor | None = None) -> Tensor:
        """Name a part of the value, for the log; returns `values` unchanged.

        name    the engine logs the mean of the values as `part/NAME`
        values  one number per position or pair
        of      bool, which of the values are the part; None: all
        """
        self.named_parts[name] = Part(values.detach(), of)
        return values

    @property
    def parts(self) -> dict[str, Tensor]:
        """The values of each part by its name; for those of some rows the host waits for a GPU."""
        return {name: values if of is None else values[of] for name, (values, of) in self.named_parts.items()}

    @property
    def rows(self) -> int:
        """How many positions there are; of pairs use the length of a signal."""
        return len(next(iter(self._signals.values())))

    def __getitem__(self, signal: Signal) -> Any:
        try:
            return self._signals[signal]
        except KeyError:
            had = ", ".join(sorted(self._signals)) or "none"
            raise UndeclaredSignal(
                f"the loss reads {signal.value!r} but its spec declares only: {had}. Add it to LossSpec.reads."
            ) from None

    def __contains__(self, signal: object) -> bool:
        return signal in self._signals

    def _log_probs(self, signal: Signal, temperature: float) -> Tensor:
        key = (signal, temperature)
        if key not in self._cache:
            self._cache[key] = log_softmax(self[signal], temperature)
        else:
            self[signal]
        return self._cache[key]


class TokenInputs(_Inputs):
    """Response positions, packed: logits `[N, V]` of student and teacher over the shared vocabulary, targets `[N]`.

    For a loss that works across tokenizers, in a run whose tokenizers differ, a row is an aligned span: logits are
    those of its first token, over the union of both vocabularies, the target is the student's first token, and
    `student_rest` and `teacher_rest` have the log-probs of the other tokens.
    """

    def only(self, reads: frozenset[Signal]) -> TokenInputs:
        """The same positions, restricted to the signals in `reads`; log-probabilities stay shared."""
        kept = {signal: value for signal, value in self._signals.items() if signal in reads}
        return type(self)(kept, self._cache)

    @property
    def student_logits(self) -> Tensor:
        """`[N, V]`, at least float32."""
        return at_least_float32(self[Signal.STUDENT_LOGITS])

    @property
    def teacher_logits(self) -> Tensor:
        """`[N, V]`, at least float32, without gradient."""
        return at_least_float32(self[Signal.TEACHER_LOGITS])

    @property
    def targets(self) -> Tensor:
        """The response's token id at each position, `[N]`."""
        return self[Signal.TARGETS]  # type: ignore[no-any-return]

    @property
    def chosen_ids(self) -> Tensor:
        """The student's likeliest tokens `[N, K]`: beside the target, the only ones that a server was asked for."""
        return self[Signal.CHOSEN_IDS]  # type: ignore[no-any-return]

    @property
    def by_student(self) -> Tensor:
        """Whether the student wrote the response, `[N]`, bool: else the teacher did, or it is the data set's."""
        return self[Signal.BY_STUDENT]  # type: ignore[no-any-return]

    @property
    def student_hidden(self) -> Tensor:
        """Hidden states `[N, K, H]` of the student's layers that `TokenLoss.bind` named, at least float32."""
        return at_least_float32(self[Signal.STUDENT_HIDDEN])

    @property
    def teacher_hidden(self) -> Tensor:
        """Hidden states `[N, K, H]` of the teacher's layers, at least float32, without gradient."""
        return at_least_float32(self[Signal.TEACHER_HIDDEN])

    @property
    def student_rest(self) -> Tensor:
        """Log-prob `[N]` under the student of what follows the span's first token in the span; 0: nothing does."""
        return self[Signal.STUDENT_REST]  # type: ignore[no-any-return]

    @property
    def teacher_rest(self) -> Tensor:
        """The same `[N]` under the teacher, which may cut the span into other tokens; without gradient."""
        return self[Signal.TEACHER_REST]  # type: ignore[no-any-return]

    def student_log_probs(self, temperature: float = 1.0) -> Tensor:
        """log q `[N, V]` in nats at a `temperature`, computed once for all terms of a run."""
        return self._log_probs(Signal.STUDENT_LOGITS, temperature)

    def teacher_log_probs(self, temperature: float = 1.0) -> Tensor:
        """log p `[N, V]` in nats at a `temperature`, computed once for all terms of a run."""
        return self._log_probs(Signal.TEACHER_LOGITS, temperature)


class RolloutInputs(TokenInputs):
    """Positions of sampled responses: what TokenInputs has, and what was known when the token was drawn, all `[N]`."""

    @property
    def advantages(self) -> Tensor:
        """What `RolloutLoss.advantages` returned for these tokens."""
        return self[Signal.ADVANTAGES]  # type: ignore[no-any-return]

    @property
    def rollout_logps(self) -> Tensor:
        """log q_old of the drawn token: the student at sampling time."""
        return self[Signal.ROLLOUT_LOGPS]  # type: ignore[no-any-return]

    @property
    def behaviour_logps(self) -> Tensor:
        """log of the probability with which the token was really drawn (p̃ under teacher-mixed sampling)."""
        return self[Signal.BEHAVIOUR_LOGPS]  # type: ignore[no-any-return]

    @property
    def teacher_logps(self) -> Tensor:
        """log p of the drawn token under the teacher."""
        return self[Signal.TEACHER_LOGPS]  # type: ignore[no-any-return]

    def student_logps(self) -> Tensor:
        """log q of the drawn token under the student of now, with gradient."""
        return gather_logps(self.student_log_probs(), self.targets)


class PairInputs(_Inputs):
    """A chosen and a rejected response per prompt: summed log-probs in nats, lengths in tokens, `[B]`.

    Log-probs of single tokens are `[B, T]`, from the first token on, and 0 behind the last: their sum is that of the
    response. T is the same for both responses; `dpkd.functional.token_mask` says which places hold a token.
    """

    @property
    def student(self) -> Pair:
        """log q(y_t|x) and log q(y_s|x), summed over tokens, EOS included."""
        return self[Signal.STUDENT_LOGPS]  # type: ignore[no-any-return]

    @property
    def teacher(self) -> Pair:
        """log p(y_t|x) and log p(y_s|x), summed over tokens, without gradient."""
        return self[Signal.TEACHER_LOGPS]  # type: ignore[no-any-return]

    @property
    def reference(self) -> Pair:
        """log-probs of y_t and y_s under the student as it was at the start, summed over tokens, without gradient."""
        return self[Signal.REFERENCE_LOGPS]  # type: ignore[no-any-return]

    @property
    def student_token_logps(self) -> Pair:
        """log q of each token of y_t and of y_s, `[B, T]`."""
        return self[Signal.STUDENT_TOKEN_LOGPS]  # type: ignore[no-any-return]

    @property
    def teacher_token_logps(self) -> Pair:
        """log p of each token of y_t and of y_s, `[B, T]`, without gradient."""
        return self[Signal.TEACHER_TOKEN_LOGPS]  # type: ignore[no-any-return]

    @property
    def reference_token_logps(self) -> Pair:
        """The same `[B, T]` under the student as it was at the start, without gradient."""
        return self[Signal.REFERENCE_TOKEN_LOGPS]  # type: ignore[no-any-return]

    @property
    def lengths(self) -> Pair:
        """Tokens of y_t and y_s as floats, EOS included, at least 1."""
        return self[Signal.LENGTHS]  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Rollout:
    """One collection of sampled responses, before training on it: rows of a sequence stand together, in order.

    `rollout_logps`, `behaviour_logps` and `teacher_logps` are `[N]`, in nats, of the drawn tokens;
    `sequence` `[N]` numbers the responses from 0. Of the R responses themselves there is

    prompt     `[R]` the number of the prompt that each answers: those to one prompt are a group, for a baseline
    prompts    text of the prompt of each, as the model read it
    responses  text of each, without special tokens
    rewards    `[R]` what the metric of `text.reward` gave each, for losses that read Signal.REWARDS; else None
    """

    rollout_logps: Tensor
    behaviour_logps: Tensor
    teacher_logps: Tensor
    sequence: Tensor
    prompt: Tensor | None = None
    prompts: tuple[str, ...] = ()
    responses: tuple[str, ...] = ()
    rewards: Tensor | None = None
