"""All that a plugin imports: specs, configs, base classes, signals and the hook marker.

A plugin is one module with a frozen config, a loss class, one `SPEC` and one hook:

    @hookimpl
    def dpkd_losses():
        return [SPEC]

It says the mathematics of its paper and stops there. The engine shifts, masks, packs, chunks, reduces, samples,
moves devices and logs. Shapes in names: N response positions, V vocabulary, B pairs, K layers, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import pluggy
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from dpkd.functional import at_least_float32, gather_logps, log_softmax
from dpkd.settings import with_none

__all__ = [
    "HIDDEN",
    "Ability",
    "Answers",
    "Card",
    "Family",
    "GenerationModel",
    "Layers",
    "LossConfig",
    "LossSpec",
    "MetricSpec",
    "Pair",
    "PairInputs",
    "PairLoss",
    "Rollout",
    "RolloutInputs",
    "RolloutLoss",
    "Sampled",
    "Sampler",
    "SamplerConfig",
    "SamplerSpec",
    "SamplingTask",
    "Signal",
    "Source",
    "Stack",
    "TeacherAccess",
    "Text",
    "TokenInputs",
    "TokenLoss",
    "TokenScores",
    "Trait",
    "UndeclaredSignal",
    "hookimpl",
    "setting",
]

hookimpl = pluggy.HookimplMarker("dpkd")


class Text(StrEnum):
    """Who wrote the response tokens."""

    DATASET = "dataset"
    TEACHER = "teacher"
    STUDENT = "student"


class TeacherAccess(StrEnum):
    """What is needed of the teacher, from least to most."""

    NONE = "nothing"
    TEXT = "text"
    TOKEN_LOGPS = "token log-probs"
    SAMPLED = "sampled tokens"
    TOP_K = "top-k log-probs"
    LOGITS = "logits"
    HIDDEN = "hidden states"


class Signal(StrEnum):
    """What a loss may read. It reads what its spec declares, and nothing else."""

    TARGETS = "targets"  # the response's token at each position [N]
    BY_STUDENT = "by_student"  # whether the student wrote the response that the position is in [N], bool
    STUDENT_LOGITS = "student_logits"  # [N, V]
    TEACHER_LOGITS = "teacher_logits"  # [N, V]
    STUDENT_LOGPS = "student_logps"  # of whole responses, chosen and rejected [B]
    TEACHER_LOGPS = "teacher_logps"  # of whole responses [B]; in a RolloutLoss of the drawn tokens [N]
    REFERENCE_LOGPS = "reference_logps"  # of whole responses, under the student as it was at the start of the run [B]
    LENGTHS = "lengths"  # tokens of each response, EOS included [B]
    ADVANTAGES = "advantages"  # what RolloutLoss.advantages returned [N]
    ROLLOUT_LOGPS = "rollout_logps"  # student log-prob of the token when it was sampled [N]
    BEHAVIOUR_LOGPS = "behaviour_logps"  # log-prob under the policy that drew it (a teacher mix, say) [N]
    STUDENT_REST = "student_rest"  # log-prob of a span's tokens after the first; 0 where tokenizers are the same [N]
    TEACHER_REST = "teacher_rest"  # the same under the teacher, in its own tokens [N]
    STUDENT_HIDDEN = "student_hidden"  # of the layers that TokenLoss.bind names [N, K, H]
    TEACHER_HIDDEN = "teacher_hidden"  # of the layers that TokenLoss.bind names [N, K, H]


# A loss that reads one of these gets whole micro-batches, and so no logits.
HIDDEN = frozenset({Signal.STUDENT_HIDDEN, Signal.TEACHER_HIDDEN})


class Trait(StrEnum):
    """A promise about the mathematics, verified by `dpkd.testing`."""

    ZERO_AT_MATCH = "zero at match"  # student = teacher: value 0 and gradient 0
    STATIONARY_AT_MATCH = "stationary at match"  # student = teacher: gradient 0, whatever the value
    NON_NEGATIVE = "non-negative"
    SHIFT_INVARIANT = "shift invariant"  # a constant added to all logits of a position changes nothing
    SCORE_FUNCTION = "score function"  # the gradient is right in expectation only; the value means nothing
    LINEAR_IN_TEACHER = "linear in the teacher"  # a mean of teachers gives the mean gradient: samples of it will do
    DETACHED_WEIGHTS = "detached weights"  # autograd differs from finite differences by design
    # Rows may be spans of text that two tokenizers both delimit, with logits over the union of both vocabularies: a
    # model has -inf for tokens that only the other has, and the value stays finite.
    ACROSS_TOKENIZERS = "across tokenizers"


class Family(StrEnum):
    """Which base class a loss has."""

    TOKEN = "token"
    PAIR = "pair"
    ROLLOUT = "rollout"


class UndeclaredSignal(RuntimeError):
    """A loss read a signal that its spec does not declare."""


class LossConfig(BaseModel):
    """Base of a loss's settings: closed, frozen, finite numbers, every field described (use `setting`)."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _none_is_a_word(cls, values: Any) -> Any:
        return with_none(cls, values)


def setting(default: Any, *, description: str, source: str, **bounds: Any) -> Any:
    """A described field of a loss config; `source` says where the default comes from; bounds as pydantic's."""
    return Field(default, description=description, json_schema_extra={"source": source}, **bounds)


@dataclass(frozen=True)
class Source:
    """Where an objective comes from: title, link, and the place in it (equation, section)."""

    title: str
    url: str
    where: str = ""
    bibtex: str = ""


@dataclass(frozen=True)
class Card:
    """What a user reads before choosing a loss."""

    title: str
    summary: str  # one line
    formula: str  # plain text with Unicode mathematics, per position or per pair
    sources: tuple[Source, ...]
    use_when: str
    avoid_when: str
    notes: str = ""  # errata, what differs between paper, released code and other toolkits


class Pair(NamedTuple):
    """One value for the chosen (y_t) and one for the rejected response (y_s) of each prompt, `[B]`."""

    chosen: Tensor
    rejected: Tensor


class Stack(NamedTuple):
    """What the hidden states of a model are like: state 0 is the embedding, state `layers` is what the head reads."""

    layers: int
    width: int


class Layers(NamedTuple):
    """The hidden states that a loss reads, in the order in which its signals have them."""

    student: tuple[int, ...] = ()
    teacher: tuple[int, ...] = ()


class _Inputs:
    """Signals by name; reading one that was not declared raises UndeclaredSignal."""

    def __init__(self, signals: Mapping[Signal, Any], cache: dict[tuple[Signal, float], Tensor] | None = None) -> None:
        self._signals = dict(signals)
        self._cache: dict[tuple[Signal, float], Tensor] = {} if cache is None else cache
        self.parts: dict[str, Tensor] = {}

    def part(self, name: str, values: Tensor) -> Tensor:
        """Name a part of the value, one number per position or pair, for the log; returns it unchanged.

        The engine logs its mean as `part/NAME`.
        """
        self.parts[name] = values.detach()
        return values

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
        """The same positions, restricted to some signals; log-probabilities stay shared."""
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
        """log q `[N, V]` in nats, computed once for all terms of a run."""
        return self._log_probs(Signal.STUDENT_LOGITS, temperature)

    def teacher_log_probs(self, temperature: float = 1.0) -> Tensor:
        """log p `[N, V]` in nats, computed once for all terms of a run."""
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
    """A chosen and a rejected response per prompt: summed log-probs in nats, lengths in tokens, `[B]`."""

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
    def lengths(self) -> Pair:
        """Tokens of y_t and y_s as floats, EOS included, at least 1."""
        return self[Signal.LENGTHS]  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Rollout:
    """One collection of sampled responses, before training on it: rows of a sequence stand together, in order.

    `rollout_logps`, `behaviour_logps` and `teacher_logps` are `[N]`, in nats, of the drawn tokens;
    `sequence` `[N]` numbers the responses from 0.
    """

    rollout_logps: Tensor
    behaviour_logps: Tensor
    teacher_logps: Tensor
    sequence: Tensor


ConfigT = TypeVar("ConfigT", bound=LossConfig)


class TokenLoss(nn.Module, Generic[ConfigT]):
    """One value per response position, from logits or from hidden states."""

    family = Family.TOKEN

    def __init__(self, config: ConfigT) -> None:
        super().__init__()
        self.config = config

    def bind(self, student: Stack, teacher: Stack) -> Layers:
        """Make the weights that depend on the models, and say which hidden states the loss reads.

        Called once, before the optimizer is made, on a loss that reads hidden states; without a teacher its stack is
        `Stack(0, 0)`. Raises ValueError, in words for the user, when the models do not fit the settings.
        """
        raise NotImplementedError(f"{type(self).__name__} reads hidden states, so it needs a method `bind`")

    def forward(self, x: TokenInputs) -> Tensor:
        """One float32 value per position `[N]`, in nats; no mean, no mask, no weight."""
        raise NotImplementedError


class PairLoss(nn.Module, Generic[ConfigT]):
    """One value per pair, from the log-probs of whole responses."""

    family = Family.PAIR

    def __init__(self, config: ConfigT) -> None:
        super().__init__()
        self.config = config

    def forward(self, x: PairInputs) -> Tensor:
        """One float32 value per pair `[B]`."""
        raise NotImplementedError


class RolloutLoss(nn.Module, Generic[ConfigT]):
    """One surrogate value per sampled token: for policy-gradient objectives."""

    family = Family.ROLLOUT

    def __init__(self, config: ConfigT) -> None:
        super().__init__()
        self.config = config

    def advantages(self, rollout: Rollout) -> Tensor:
        """What each drawn token is worth `[N]`: called once per collection, over whole sequences, without gradient."""
        raise NotImplementedError

    def forward(self, x: RolloutInputs) -> Tensor:
        """One float32 surrogate value per token `[N]`; `x` may be any slice of the collection."""
        raise NotImplementedError


Loss = TokenLoss[Any] | PairLoss[Any] | RolloutLoss[Any]
Reads = frozenset[Signal] | Callable[[Any], frozenset[Signal]]


@dataclass(frozen=True)
class LossSpec:
    """Everything that dpkd knows about a loss: its door into the registry.

    reads     the signals it reads, or a function from its config to them
    accepts   who may have written the text (for pairs: either response)
    top_k     how many of the teacher's likeliest tokens, beside the mass of the rest, decide the value; None: all
    suggests  run settings that the paper used, as a nested mapping; any layer of the user overrides them
    traits    promises that the conformance kit verifies
    """

    name: str
    loss: type[Loss]
    config: type[LossConfig]
    card: Card
    reads: Reads
    accepts: frozenset[Text] = frozenset(Text)
    suggests: Mapping[str, Any] = field(default_factory=dict)
    traits: frozenset[Trait] = frozenset()
    top_k: Callable[[Any], int] | None = None

    @property
    def family(self) -> Family:
        """Which base class the loss has."""
        return self.loss.family

    def signals(self, config: LossConfig | None = None) -> frozenset[Signal]:
        """What the loss reads under a config (the defaults when None)."""
        if callable(self.reads):
            return self.reads(config if config is not None else self.config())
        return self.reads

    def needs(self, config: LossConfig | None = None) -> TeacherAccess:
        """What the loss itself needs of the teacher; the text may need more."""
        signals = self.signals(config)
        if Signal.TEACHER_HIDDEN in signals:
            return TeacherAccess.HIDDEN
        if Signal.TEACHER_LOGITS in signals:
            return TeacherAccess.LOGITS if self.top_k is None else TeacherAccess.TOP_K
        if Signal.TEACHER_LOGPS in signals:
            return TeacherAccess.TOKEN_LOGPS
        return TeacherAccess.NONE


@dataclass(frozen=True)
class Answers:
    """A model's answers to the rows of a set, under one seed; all of one length, in the order of the rows.

    predictions  the answers as text, white space around them taken off
    references   the accepted answers of each row, at least one
    tokens       tokens of each answer, EOS included
    truncated    whether an answer ran into the length limit
    """

    predictions: Sequence[str]
    references: Sequence[Sequence[str]]
    tokens: Sequence[int]
    truncated: Sequence[bool]


@dataclass(frozen=True)
class TokenScores:
    """Given responses under a model and its teacher, token by token: NumPy arrays of float64, in nats.

    N is the number of response tokens of all rows together, EOS included; what needs a teacher is None without one.

    logq_N        log-probs of the tokens under the model
    sequence_N    the row that each token belongs to, counted from 0 and rising
    logp_N        log-probs under the teacher
    forward_kl_N  KL(teacher‖student) at the token, over the whole vocabulary
    reverse_kl_N  KL(student‖teacher) at the token
    text_bytes    UTF-8 bytes of all responses together
    """

    logq_N: Any
    sequence_N: Any
    logp_N: Any = None
    forward_kl_N: Any = None
    reverse_kl_N: Any = None
    text_bytes: int | None = None


@dataclass(frozen=True)
class MetricSpec:
    """A metric, computed by exactly one of three functions.

    name       lower-case, with underscores: the key in scores.json
    unit       what the number counts: "× 100", "words"
    better     `higher`, `lower`, or empty where neither is
    summary    one line
    per_row    from a model's answers to a value for each row (None: the row has none); rows are averaged
    overall    from a model's answers to one value, where it is no mean over rows
    of_tokens  from the references under model and teacher to one value (None: it needs a teacher, or a token)
    title      the metric's name in tables and charts; empty: `name` with spaces
    """

    name: str
    unit: str
    better: str
    summary: str
    per_row: Callable[[Answers], Sequence[float | None]] | None = None
    overall: Callable[[Answers], float | None] | None = None
    of_tokens: Callable[[TokenScores], float | None] | None = None
    title: str = ""

    @property
    def label(self) -> str:
        """The metric's name for people."""
        return self.title or self.name.replace("_", " ")


class Ability(StrEnum):
    """What a run may ask of a sampler beyond text drawn from one model."""

    TEACHER_MIX = "teacher mix"  # each token from a mixture of two models, or vetoed by one
    LOGPS = "log-probs"  # of the drawn tokens, under plain sampling: temperature 1, no top-k, no top-p
    FILTERED_LOGPS = "filtered log-probs"  # the same under any sampling: of the model at 1, and of what drew the token
    QUANTIZED = "packed weights"  # text by a teacher with teacher.quantization
    SEVERAL_PROCESSES = "several processes"  # one sampler in each process of a run


@dataclass(frozen=True)
class Sampled:
    """One response as it was drawn; log-probs in nats, one per token.

    response_ids     EOS included when it was drawn
    logps            log q under the (student) model at temperature 1, before any filter
    behaviour_logps  under the policy that drew the token: temperature, top-k, top-p, teacher mix
    truncated        no EOS within the limit
    """

    response_ids: tuple[int, ...]
    logps: tuple[float, ...]
    behaviour_logps: tuple[float, ...]
    truncated: bool


@dataclass(frozen=True)
class SamplingTask:
    """What is to be written: `num_generations` responses to each prompt.

    prompts             token ids of each prompt
    seeds               one non-negative number per response, those of one prompt together; the response to a prompt
                        under a seed may depend on nothing else
    temperature         0 is greedy
    top_p, top_k        1 and 0: all tokens
    max_new_tokens      a response without EOS ends here
    batch_size          responses written together, where that is the sampler's to decide
    logps               whether anybody will read the log-probs; where not, they may be left empty
    mix_with, mix       draw each token from `mix · mix_with + (1 - mix) · model`
    mix_with, veto      `mix_with` replaces tokens that are not among its `veto` likeliest by its own draw
    """

    prompts: Sequence[Sequence[int]]
    seeds: Sequence[int]
    num_generations: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 256
    batch_size: int = 32
    logps: bool = True
    mix_with: nn.Module | None = None
    mix: float = 0.0
    veto: int = 0


class Sampler(Protocol):
    """A model that writes. It lives as long as the run that opened it."""

    def refresh(self) -> None:
        """Take over the weights that the model has now: they may have changed since the last call of `draw`."""

    def draw(self, task: SamplingTask, on_finished: Callable[[int, Sampled], None] | None = None) -> list[Sampled]:
        """A response per seed, in the order of `seeds`; `on_finished` gets each with its place, once it is known."""

    def close(self) -> None:
        """Give back memory."""


@dataclass(frozen=True)
class GenerationModel:
    """The model that a sampler is opened for.

    model       a causal LM of transformers, perhaps with adapters of peft; its weights change while it is trained
    vocabulary  only ids below it are drawn, and log-probs are normalized over them; None: all that the model has
    eos_ids     a response ends with any of them
    context     prompt and response have so many tokens at most, if not fewer by the model itself; None: the model's
    """

    model: nn.Module
    vocabulary: int | None
    eos_ids: frozenset[int]
    pad_id: int
    context: int | None = None


class SamplerConfig(LossConfig):
    """Base of a sampler's own settings: closed, frozen, described, as those of a loss."""


def _nothing_missing() -> str | None:
    """A sampler that works everywhere."""
    return None


@dataclass(frozen=True)
class SamplerSpec:
    """A way to write responses, `text.backend`.

    name     lower-case letters and digits with dashes between
    summary  one line
    open     makes the sampler of a model; heavy packages are imported here, and no earlier
    config   its own settings, `text.backend_settings`
    lacks    what it cannot do, with the reason: a run that asks for it is refused before anything is loaded
    missing  why it cannot work on this machine (a package, say) and what to do, or None; it must be quick
    """

    name: str
    summary: str
    open: Callable[[GenerationModel, Any], Sampler]
    config: type[SamplerConfig] = SamplerConfig
    lacks: Mapping[Ability, str] = field(default_factory=dict)
    missing: Callable[[], str | None] = _nothing_missing
