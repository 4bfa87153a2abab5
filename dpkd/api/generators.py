"""Generation backends: what draws tokens, for `text.backend` and `dpkd sample --backend`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal, NamedTuple, Protocol

from torch import Tensor, nn

from dpkd.errors import warn_renamed
from dpkd.settings import Block

Decoding = Literal["auto", "graph", "eager"]


class Ability(StrEnum):
    """What a run may ask of a sampler beyond text drawn from one model."""

    TEACHER_MIX = "teacher mix"  # each token from a mixture of two models, or vetoed by one
    LOGPS = "log-probs"  # of the drawn tokens, under plain sampling: temperature 1, no top-k, no top-p
    FILTERED_LOGPS = "filtered log-probs"  # the same under any sampling: of the model at 1, and of what drew the token
    QUANTIZED = "packed weights"  # text by a teacher with teacher.quantization
    SEVERAL_PROCESSES = "several processes"  # one sampler in each process of a run


@dataclass(frozen=True)
class Sampled:
    """One response as it was drawn; log-probs in nats, one per token: 1-D tensors on the host, empty if not asked for.

    Two are equal when their tokens are: log-probs differ with the batch in their last bits.

    response_ids     EOS included when it was drawn
    logps            log q under the (student) model at temperature 1, before any filter
    behaviour_logps  under the policy that drew the token: temperature, top-k, top-p, teacher mix
    truncated        no EOS within the limit
    """

    response_ids: tuple[int, ...]
    logps: Tensor = field(compare=False)
    behaviour_logps: Tensor = field(compare=False)
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

    @property
    def samples_per_prompt(self) -> int:
        """Deprecated name of `num_generations`."""
        warn_renamed("SamplingTask.samples_per_prompt", "num_generations")
        return self.num_generations


class Sampler(Protocol):
    """A model that writes. It lives as long as the run that opened it."""

    def refresh(self) -> None:
        """Take over the weights that the model has now: they may have changed since the last call of `draw`."""

    def draw(self, task: SamplingTask, on_finished: Callable[[int, Sampled], None] | None = None) -> list[Sampled]:
        """A response per seed of the `task`, in the order of its seeds.

        `on_finished` is called with the place of each response and the response, once it is known.
        """

    def close(self) -> None:
        """Give back memory."""


@dataclass(frozen=True)
class GenerationModel:
    """The model that a sampler is opened for.

    model       a causal LM of transformers, perhaps with adapters of peft; its weights change while it is trained
    vocabulary  only ids below it are drawn, and log-probs are normalized over them; None: all that the model has
    eos_ids     a response ends with any of them
    pad_id      the id that fills up shorter rows of a batch
    context     prompt and response have so many tokens at most, if not fewer by the model itself; None: the model's
    longest     tokens of the longest prompt with its response that will be asked for; None: not known
    decoding    how a sampler of this process decodes, `text.decoding`: auto, graph or eager
    """

    model: nn.Module
    vocabulary: int | None
    eos_ids: frozenset[int]
    pad_id: int
    context: int | None = None
    decoding: Decoding = "auto"
    longest: int | None = None


class SamplerConfig(Block):
    """Base of a sampler's own settings: closed, frozen, every field described."""


class SamplerMemory(NamedTuple):
    """Bytes that a sampler takes on the device beside the model.

    drawing   while it draws
    training  while the student trains
    """

    drawing: float
    training: float


def _nothing_missing() -> str | None:
    """A sampler that works everywhere."""
    return None


@dataclass(frozen=True)
class SamplerSpec:
    """A way to write responses, `text.backend`.

    name          lower-case letters and digits with dashes between
    summary       one line
    open          makes the sampler of a model; heavy packages are imported here, and no earlier
    config        its own settings, `text.backend_settings`
    lacks         what it cannot do, with the reason: a run that asks for it is refused before anything is loaded
    missing       why it cannot work on this machine (a package, say) and what to do, or None; it must be quick
    student_only  whether it draws the student's text only; that of a teacher in memory is drawn by hf
    memory        what it takes, given its settings, the model's parameters and the device's bytes (None: not known);
                  None: it draws with the model itself
    """

    name: str
    summary: str
    open: Callable[[GenerationModel, Any], Sampler]
    config: type[SamplerConfig] = SamplerConfig
    lacks: Mapping[Ability, str] = field(default_factory=dict)
    missing: Callable[[], str | None] = _nothing_missing
    student_only: bool = False
    memory: Callable[[Any, int, int | None], SamplerMemory] | None = None
