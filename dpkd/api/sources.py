"""Response sources: who writes the responses that a loss is computed on, for `text.source`.

A source is a settings block (`SourceConfig`), a class (`ResponseSource`; `SourceBase` in source_base.py has all that
sources share) and one `SourceSpec`, registered by the hook `dpkd_response_sources`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import torch
from pydantic import Field, model_validator
from torch import Tensor

from dpkd.api.generators import Decoding
from dpkd.api.losses import Text
from dpkd.settings import Block


@dataclass(frozen=True, eq=False)
class Response:
    """A response and, if it was sampled for a policy gradient, what was known then (else None), `[T]` on the host.

    ids              its tokens, EOS included
    writer           who wrote it
    truncated        whether it ran into the length limit, without EOS
    rollout_logps    log-prob in nats of each token under the student that drew it
    behaviour_logps  under what really drew it: filters and a teacher's share included
    teacher_logps    under the teacher
    advantages       what each token is worth
    reward           what the whole response is worth to a reward function
    """

    ids: tuple[int, ...]
    writer: Text
    truncated: bool = False
    rollout_logps: Tensor | None = None
    behaviour_logps: Tensor | None = None
    teacher_logps: Tensor | None = None
    advantages: Tensor | None = None
    reward: float | None = None

    def is_empty(self, eos_ids: frozenset[int]) -> bool:
        """Whether the response is nothing but tokens of `eos_ids`."""
        return all(token in eos_ids for token in self.ids)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Response) and self.as_dict() == other.as_dict()

    def __hash__(self) -> int:
        return hash((self.ids, self.writer))

    def as_dict(self) -> dict[str, Any]:
        """For JSON; fields that are None are left out."""
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        return {k: v.tolist() if isinstance(v, Tensor) else v for k, v in values.items() if v is not None}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Response:
        """The response of the `values` that `as_dict` returned."""
        known: dict[str, Any] = {k: torch.tensor(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**{**known, "ids": tuple(values["ids"]), "writer": Text(values["writer"])})


# The responses to each of some examples, by the number of the example. For a pair the chosen one comes first.
Written = list[tuple[int, tuple[Response, ...]]]


class StepResponses(NamedTuple):
    """The `responses` of one optimizer step, and `counts` of what was left out and the like (logged as `text/NAME`)."""

    responses: Written
    counts: dict[str, float]


class SamplingSettings(Block):
    """How responses are drawn."""

    temperature: float = Field(1.0, ge=0, description="0 is greedy")
    top_p: float = Field(1.0, gt=0, le=1, description="nucleus: the smallest set of tokens with this mass")
    top_k: int = Field(0, ge=0, description="the k likeliest tokens; 0: all")
    max_new_tokens: int = Field(256, ge=1, description="a response without EOS ends here and is counted as truncated")
    batch_size: int = Field(32, ge=1, description="prompts sampled together")


Refresh = Literal["every_step", "every_n_steps", "per_epoch", "once"]


class StudentSampling(NamedTuple):
    """How the student writes for a source. A source lets the user set those that its settings have as fields."""

    num_generations: int = 1
    teacher_mix: float = 0.0
    teacher_veto: int = 0
    refresh: Refresh = "every_step"
    every: int = 1
    num_iterations: int = 1
    reward: str | None = None


class SourceConfig(Block):
    """Base of a source's settings: its name, how text is drawn, and what must be known before anything is loaded.

    `source` is narrowed to `Literal[NAME]`, with that default. A subclass with fields of the names of
    `StudentSampling` (see `Refreshed` and `TeacherGuided`) lets the user set these.
    """

    pairs: ClassVar[bool] = False  # a chosen and a rejected response to each prompt, for pair losses
    preferences: ClassVar[bool] = False  # the rows of the data set hold both of them
    follows_dev: ClassVar[bool] = False  # `ResponseSource.observe` needs the loss on held-out rows

    source: str = Field(description="who writes the responses: an installed response source")
    sampling: SamplingSettings = Field(SamplingSettings(), description="how the student's responses are drawn")
    teacher_sampling: SamplingSettings = Field(
        SamplingSettings(), description="how the teacher's responses are drawn (once, into the store)"
    )
    backend: str = Field("hf", description="what draws responses: an installed sampler (hf: this process)")
    backend_settings: dict[str, Any] = Field({}, description="the sampler's own settings")
    decoding: Decoding = Field(
        "auto",
        description="graph: static shapes, captured in graphs on CUDA; eager: growing caches; auto: graph on CUDA if "
        "its log-probs agree with a plain forward's (backend hf)",
    )
    store: str | None = Field(
        None, description="folder of the store of teacher responses; None: the user's cache folder"
    )

    @property
    def writers(self) -> Mapping[Text, str]:
        """Everybody who writes, with the setting that says so."""
        raise NotImplementedError

    def teacher_uses(self) -> dict[str, str]:
        """What else the teacher's model is needed for: the setting, and what the teacher does there (a verb first)."""
        return {}

    @property
    def draws(self) -> bool:
        """Whether any model writes."""
        return bool({Text.STUDENT, Text.TEACHER} & self.writers.keys())

    @property
    def student_sampling(self) -> StudentSampling:
        """How the student writes: the user's settings, where this source has them."""
        names = [name for name in StudentSampling._fields if name in type(self).model_fields]
        return StudentSampling(**{name: getattr(self, name) for name in names})

    @property
    def backend_key(self) -> dict[str, Any] | None:
        """What draws, for the key of a store; None where that is dpkd's own sampler."""
        return None if self.backend == "hf" else {"name": self.backend, **self.backend_settings}

    @model_validator(mode="after")
    def _student_writes(self) -> SourceConfig:
        own, default = self.student_sampling, StudentSampling()
        for name in ("teacher_mix", "teacher_veto", "num_generations"):
            if Text.STUDENT not in self.writers and getattr(own, name) != getattr(default, name):
                raise ValueError(f"`{name}` is used only where the student writes, and it does not here")
        return self


class TeacherGuided(Block):
    """Settings of a source where the teacher may take part in the student's sampling."""

    teacher_mix: float = Field(
        0.0, ge=0, lt=1, description="α: the student's tokens are drawn from α p + (1-α) q (MiniLLM: 0.2)"
    )
    teacher_veto: int = Field(
        0,
        ge=0,
        description="K: a student token that is not among the teacher's K likeliest is drawn again, by the teacher "
        "(Speculative KD: 25); 0: off",
    )

    def teacher_uses(self) -> dict[str, str]:
        """See `SourceConfig.teacher_uses`."""
        uses = {
            "teacher_mix": "mixes the teacher's tokens into the student's sampling",
            "teacher_veto": "lets the teacher's tokens replace the student's",
        }
        return {name: why for name, why in uses.items() if getattr(self, name) > 0}

    @model_validator(mode="after")
    def _one_way_in(self) -> TeacherGuided:
        if self.teacher_mix > 0 and self.teacher_veto > 0:
            raise ValueError("`teacher_mix` and `teacher_veto` exclude each other: leave one out")
        return self


class Refreshed(Block):
    """Settings of a source where the student writes new responses now and then."""

    refresh: Refresh = Field("every_step", description="when the student writes new responses")
    every: int = Field(
        1, ge=1, description="with refresh `every_n_steps`: the n; prompts of n steps are sampled together"
    )
    num_iterations: int = Field(
        1, ge=1, description="how often the optimizer goes over the responses of one refresh (MiniLLM: 4)"
    )

    @model_validator(mode="after")
    def _periods(self) -> Refreshed:
        if self.every > 1 and self.refresh != "every_n_steps":
            raise ValueError(f"`every` is used only with refresh `every_n_steps`, not with {self.refresh!r}")
        if self.num_iterations > 1 and self.refresh not in ("every_step", "every_n_steps"):
            raise ValueError("`num_iterations` is used only with refresh `every_step` or `every_n_steps`")
        return self


class PromptTokens(Protocol):
    """A prompt and the data set's response, in tokens; of a pair the chosen one, and the rejected one."""

    @property
    def id(self) -> str: ...
    @property
    def prompt_ids(self) -> tuple[int, ...]: ...
    @property
    def response_ids(self) -> tuple[int, ...]: ...
    @property
    def rejected_ids(self) -> tuple[int, ...]: ...


class Batches(Protocol):
    """Which examples each optimizer step uses, and when the student writes new responses."""

    steps: int

    def window(self, step: int) -> list[int]: ...
    def period(self, step: int) -> int: ...
    def starts_period(self, step: int) -> bool: ...


def _not_open(*asked: Any) -> Any:
    """Stands for a generator that the settings do not ask for (`asked` is ignored), and for all in a dry run."""
    raise AssertionError("the source asks for text by somebody who is not among the `writers` of its settings")


@dataclass(frozen=True)
class SourceContext:
    """What a source is opened with. In a dry run nobody writes: all but the three functions is there.

    prompts     the examples, by number
    batches     which examples each step uses
    seed        the run's; every draw of a source is seeded by it and the step or example
    eos_ids     tokens that end a response
    max_length  the longest sequence that the models read; None: no limit
    student     writes responses to these examples for a refresh period: `num_generations` to each
    teacher     gives the teacher's response to each of these examples
    score       the same responses, each with the teacher's log-prob of every token
    """

    prompts: Sequence[PromptTokens]
    batches: Batches
    seed: int
    eos_ids: frozenset[int]
    max_length: int | None = None
    student: Callable[[Sequence[int], int], list[tuple[Response, ...]]] = _not_open
    teacher: Callable[[Sequence[int]], list[Response]] = _not_open
    score: Callable[[Sequence[int], Sequence[Response]], list[Response]] = _not_open


@dataclass(frozen=True)
class SourcePlan:
    """What a source will do, known before any weight is loaded.

    rows     lines for the dry run: a heading and what it says
    longest  writer and greatest number of tokens of each response to an example
    """

    rows: list[tuple[str, str]]
    longest: Callable[[int], tuple[tuple[Text, int], ...]]


class ResponseSource(Protocol):
    """Gives each optimizer step its responses."""

    config: Any
    context: SourceContext

    def prepare(self) -> None:
        """Before the first step: have written whatever can be, the teacher's responses above all."""

    def next(self, step: int) -> StepResponses:
        """The responses of the step `step` (0-based). Steps come in order, each once."""

    def fixed(self, indices: Sequence[int]) -> Written:
        """The responses to the examples `indices` that no step changes: those of all writers but the student."""

    def observe(self, loss: float) -> None:
        """Told the mean `loss` (nats per token) on held-out rows, whenever it was measured."""

    def describe(self) -> SourcePlan:
        """What will be written, by whom, and how long it may get."""

    def state(self) -> dict[str, Any]:
        """What decides later steps, as JSON has it: a resumed run must go on exactly."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state`."""


@dataclass(frozen=True)
class SourceSpec:
    """A response source, registered by the hook `dpkd_response_sources`.

    name     what `text.source` says: lower-case letters and digits with dashes between
    summary  one line
    open     makes the source: usually its class
    config   its settings, a subclass of `SourceConfig`
    """

    name: str
    summary: str
    open: Callable[[Any, SourceContext], ResponseSource]
    config: type[SourceConfig]
