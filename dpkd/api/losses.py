"""Objectives: settings, the three base classes, and the spec by which a loss is registered."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Generic, TypeVar

from pydantic import Field, create_model
from torch import Tensor, nn

from dpkd.api.cards import Card
from dpkd.api.inputs import TEACHER_LOGPS, Layers, PairInputs, Rollout, RolloutInputs, Signal, Stack, TokenInputs
from dpkd.settings import Block


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
    CHOSEN_IDS = "log-probs of chosen ids"
    LOGITS = "logits"
    HIDDEN = "hidden states"

    @property
    def sentence(self) -> str:
        """As a teacher's offer: who gives logits or hidden states gives everything before them."""
        included = {"logits": "logits (and log-probs)", "hidden states": "hidden states, logits and log-probs"}
        return included.get(self.value, self.value)


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


class LossConfig(Block):
    """Base of a loss's settings: closed, frozen, finite numbers, every field described (use `setting`)."""


def setting(default: Any, *, description: str, source: str, **bounds: Any) -> Any:
    """A described field of a loss config.

    default      its value where the user sets none
    description  what it does, in a few words
    source       where the default comes from: a paper's equation or table, released code, or your choice
    bounds       pydantic's: `ge`, `gt`, `le`, `lt`, ...
    """
    return Field(default, description=description, json_schema_extra={"source": source}, **bounds)


ConfigT = TypeVar("ConfigT", bound=LossConfig)


class TokenLoss(nn.Module, Generic[ConfigT]):
    """One value per response position, from logits or from hidden states; `config` has its settings."""

    family = Family.TOKEN

    def __init__(self, config: ConfigT) -> None:
        super().__init__()
        self.config = config

    def bind(self, student: Stack, teacher: Stack) -> Layers:
        """Make the weights that depend on the models, and say which hidden states the loss reads.

        Called once, before the optimizer is made, on a loss that reads hidden states. `student` and `teacher` are the
        sizes of the models; without a teacher its stack is `Stack(0, 0)`. Raises ValueError, in words for the user,
        when the models do not fit the settings.
        """
        raise NotImplementedError(f"{type(self).__name__} reads hidden states, so it needs a method `bind`")

    def forward(self, x: TokenInputs) -> Tensor:
        """One float32 value per position `[N]` of `x`, in nats; no mean, no mask, no weight."""
        raise NotImplementedError


class PairLoss(nn.Module, Generic[ConfigT]):
    """One value per pair, from the log-probs of whole responses; `config` has its settings."""

    family = Family.PAIR

    def __init__(self, config: ConfigT) -> None:
        super().__init__()
        self.config = config

    def forward(self, x: PairInputs) -> Tensor:
        """One float32 value per pair `[B]` of `x`."""
        raise NotImplementedError


class RolloutLoss(nn.Module, Generic[ConfigT]):
    """One surrogate value per sampled token: for policy-gradient objectives; `config` has its settings."""

    family = Family.ROLLOUT

    def __init__(self, config: ConfigT) -> None:
        super().__init__()
        self.config = config

    def advantages(self, rollout: Rollout) -> Tensor:
        """What each drawn token of a `rollout` is worth `[N]`.

        Called once per collection, over whole sequences, without gradient.
        """
        raise NotImplementedError

    def forward(self, x: RolloutInputs) -> Tensor:
        """One float32 surrogate value per token `[N]`; `x` may be any slice of the collection."""
        raise NotImplementedError


Loss = TokenLoss[Any] | PairLoss[Any] | RolloutLoss[Any]
Reads = frozenset[Signal] | Callable[[Any], frozenset[Signal]]


@dataclass(frozen=True)
class LossSpec:
    """Everything that dpkd knows about a loss: its door into the registry.

    name          of the loss, of its entry point and of its settings: lower-case, with dashes
    loss          its class, and `config` the class of its settings
    card          what a user reads before choosing it
    reads         the signals it reads, or a function from its config to them
    accepts       who may have written the text (for pairs: either response)
    top_k         how many of the teacher's likeliest tokens, beside the mass of the rest, decide the value; None: all
    chosen_k      how many of the student's likeliest tokens (Signal.CHOSEN_IDS), beside the given one and the mass of
                  the rest, decide what is read of the teacher; None: not these alone
    suggests      run settings that the paper used, as a nested mapping; any layer of the user overrides them
    traits        promises that the conformance kit verifies
    linear_when   under which settings LINEAR_IN_TEACHER holds; None: under all
    reward_scale  β of the implicit reward β log q/p that is logged; None: 1
    preset_of     the loss that this one is, with other defaults or another text; empty for a loss of its own
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
    chosen_k: Callable[[Any], int] | None = None
    linear_when: Callable[[Any], bool] | None = None
    reward_scale: Callable[[Any], float] | None = None
    preset_of: str = ""

    @property
    def family(self) -> Family:
        """Which base class the loss has."""
        return self.loss.family

    def is_linear(self, config: LossConfig) -> bool:
        """Whether, under the settings `config`, samples of the teacher's distribution may stand for it."""
        return Trait.LINEAR_IN_TEACHER in self.traits and (self.linear_when is None or self.linear_when(config))

    def signals(self, config: LossConfig | None = None) -> frozenset[Signal]:
        """What the loss reads under the settings `config` (None: the defaults)."""
        if callable(self.reads):
            return self.reads(config if config is not None else self.config())
        return self.reads

    def needs(self, config: LossConfig | None = None) -> TeacherAccess:
        """What the loss itself needs of the teacher under the settings `config` (None: the defaults).

        The text may need more.
        """
        signals = self.signals(config)
        if Signal.TEACHER_HIDDEN in signals:
            return TeacherAccess.HIDDEN
        if Signal.TEACHER_LOGITS in signals and self.chosen_k is not None:
            return TeacherAccess.CHOSEN_IDS
        if Signal.TEACHER_LOGITS in signals:
            return TeacherAccess.LOGITS if self.top_k is None else TeacherAccess.TOP_K
        if TEACHER_LOGPS & signals:
            return TeacherAccess.TOKEN_LOGPS
        return TeacherAccess.NONE


def preset(
    base: LossSpec,
    *,
    name: str,
    card: Card,
    defaults: Mapping[str, tuple[Any, str]] | None = None,
    config: type[LossConfig] | None = None,
    **changes: Any,
) -> LossSpec:
    """A published method that is another loss with other defaults or another text, as a loss of its own name.

    base      the spec of the loss; what is not named here stays as it is there
    name      the name of the method, and of its entry point
    card      its own card
    defaults  settings whose default differs: name → (value, where the value comes from)
    config    a subclass of the base's config, where the method has further settings or older names of them
    changes   other fields of LossSpec that differ: `suggests`, `accepts`, `traits`

    Raises ValueError when `defaults` names no setting of the base, or gives a value that the setting refuses.
    """
    config = _with_defaults(config or base.config, name, defaults or {})
    return replace(base, name=name, card=card, config=config, preset_of=base.name, **changes)


def _with_defaults(config: type[LossConfig], name: str, defaults: Mapping[str, tuple[Any, str]]) -> type[LossConfig]:
    unknown = defaults.keys() - config.model_fields.keys()
    if unknown:
        raise ValueError(f"preset {name!r}: {config.__name__} has no setting named {', '.join(sorted(unknown))}")
    fields: dict[str, Any] = {}
    for key, (value, source) in defaults.items():
        fields[key] = (config.model_fields[key].annotation, copy(config.model_fields[key]))
        fields[key][1].default, fields[key][1].json_schema_extra = value, {"source": source}
    made = create_model(
        f"{config.__name__}_{name.replace('-', '_')}",
        __base__=config,
        __module__=config.__module__,
        __doc__=config.__doc__,
        **fields,
    )
    made.model_validate({key: value for key, (value, _) in defaults.items()})  # pydantic takes any default on trust
    return made
