"""Teachers: what answers for the teacher's distribution, and the specs of the kinds of teachers (`teacher.kind`).

Shapes: N response positions of a micro-batch, n of one chunk, V shared vocabulary, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from dpkd.api.generators import Sampler
from dpkd.api.inputs import Signal
from dpkd.api.losses import TeacherAccess, Text
from dpkd.errors import DpkdError
from dpkd.functional import gather_logps, log_softmax
from dpkd.settings import Block


class TeacherLost(DpkdError):
    """A teacher that is not in this process gives no answer any more: the run stops at a checkpoint."""


class SharedVocabulary(NamedTuple):
    """How many ids student and teacher both predict (`size`), and a `note` on it for the user, which may be empty."""

    size: int
    note: str = ""


class TeacherBatch(Protocol):
    """What a teacher scores: prompts with their responses, and the rows of the response tokens, packed `[N]`.

    sequences  prompt and response ids of each sequence; `lengths` `[B]` counts the rows of each
    targets    the response token of each row, `sequence` `[N]` the number of its sequence
    """

    @property
    def sequences(self) -> Sequence[tuple[Sequence[int], Sequence[int]]]:
        """Prompt and response ids of each sequence."""

    @property
    def lengths(self) -> Tensor:
        """Rows of each sequence `[B]`."""

    @property
    def targets(self) -> Tensor:
        """The response token of each row `[N]`."""

    @property
    def sequence(self) -> Tensor:
        """The number of the sequence of each row `[N]`."""


class TeacherPrompt(Protocol):
    """A prompt of the data: where it is from, its ids, and what the teacher's `column` says of it."""

    @property
    def id(self) -> str:
        """File and number of its row."""

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        """Its tokens."""

    @property
    def teacher(self) -> str | None:
        """What the column has; None where the teacher reads none."""


class Wants(NamedTuple):
    """What a micro-batch needs of the teacher.

    chunk   rows of logits that may be held at a time
    logps   whether log-probs of the response tokens are read, and `logits` whether logits are
    layers  the hidden states that losses read
    chosen  [N, K] the only ids, beside the given ones, at which logits are read; None: any
    """

    chunk: int
    logps: bool = False
    logits: bool = False
    layers: tuple[int, ...] = ()
    chosen: Tensor | None = None

    @property
    def anything(self) -> bool:
        """Whether the teacher is needed at all."""
        return self.logps or self.logits or bool(self.layers)


class TeacherOutput:
    """What a teacher says of one micro-batch. A subclass makes the logits of some rows; `[N, V]` is never held.

    targets  the response tokens `[N]`
    chunk    rows of logits that may be held at a time
    layers   hidden states `[N, H]` by layer, those that were wanted
    """

    def __init__(self, targets: Tensor, chunk: int, layers: Mapping[int, Tensor] | None = None) -> None:
        self.targets, self.chunk, self.layers = targets, chunk, dict(layers or {})

    def logits(self, rows: slice) -> Tensor:
        """Logits `[n, V]` of the rows `rows`, in float32, without gradient."""
        raise NotImplementedError(f"{type(self).__name__} makes no logits")

    def raw(self, rows: slice) -> tuple[Tensor, float]:
        """Logits `[n, V]` of the rows `rows` in the type that they come in, up to a factor, and that factor."""
        return self.logits(rows), 1.0

    @torch.no_grad()
    def logps(self) -> Tensor:
        """Log-prob `[N]` in nats of each response token."""
        edges = range(0, len(self.targets), self.chunk)
        slices = [slice(start, min(start + self.chunk, len(self.targets))) for start in edges]
        parts = [gather_logps(log_softmax(self.logits(rows)), self.targets[rows]) for rows in slices]
        return torch.cat(parts) if parts else torch.zeros(0, device=self.targets.device)

    def signals(self, student_logits_nV: Tensor, targets_n: Tensor, rows: slice) -> Mapping[Signal, Tensor]:
        """What a loss that reads the teacher gets for some rows of the student, beside or in place of the rest.

        student_logits_nV  the student's logits at these rows, and `targets_n` their response tokens
        rows               their place in the micro-batch
        """
        return {Signal.TEACHER_LOGITS: self.logits(rows).to(student_logits_nV.dtype)}

    def is_finite(self) -> bool:
        """Whether its numbers are; asked when a loss is not."""
        return bool(torch.isfinite(self.logits(slice(0, 64))).all())


@dataclass(frozen=True)
class TeacherOffer:
    """What a teacher can give, known before anything of it is loaded: compared with what the losses of a run need.

    access      the most that it gives
    k           of TOP_K, CHOSEN_IDS and SAMPLED: how many tokens; `vocabulary` ids or more are the whole distribution
    writers     on whose responses; None: on anybody's
    writes      whether it writes responses of its own
    what, has   for messages: `the store` has `the 64 likeliest tokens and the mass of the rest`
    more        how to get more of it: an access level (and its k), or a writer, to a few words; None: not at all
    """

    access: TeacherAccess
    k: int = 0
    vocabulary: int = 0
    writers: frozenset[Text] | None = None
    writes: bool = True
    what: str = "the teacher"
    has: str = ""
    more: Callable[..., str] | None = None


@dataclass(frozen=True)
class TeacherText:
    """Where a teacher's own responses come from.

    model        what writes them; None: nothing can, so all that are wanted must be in `folder`
    vocabulary   ids that may be drawn
    fingerprint  whose they are, for the key of the store of responses
    folder       the store of responses; None: the user's
    sampler      opens what writes them where that is no model of this process
    """

    model: nn.Module | None
    vocabulary: int
    fingerprint: str
    folder: Path | None = None
    sampler: Callable[[], Sampler] | None = None


class Teacher:
    """A frozen teacher. Making one is cheap: the plan asks it what it is, and `load` brings what it needs to answer.

    offers      the most that it can give; compared with what the losses need before anything is loaded
    tokenizer   its own; None where its ids are the student's by construction
    config      of the causal LM, where it is one: sizes, and the longest sequence that it reads
    model       that LM, once it is loaded: a student may start from its layers
    measurable  whether it has the whole distribution at every row of the student's tokens: divergences are logged
    remote      whether it answers from outside this process: it is asked ahead, and may be lost (TeacherLost)
    chooses     whether it must be told at which ids logits are read, where losses read the student's likeliest only
    context     the longest sequence that it reads, where it has no `config` that says it
    of_student  whether it is the student itself, without its adapters: it needs some, and gets the student by `join`
    column      column of the data that it reads of each row (`TeacherPrompt.teacher`); None: none
    widest      logits of a row that a loss sees, where that is more than the student's vocabulary
    vocabulary  ids that it predicts, once it is loaded
    """

    offers: TeacherAccess = TeacherAccess.LOGITS
    tokenizer: Any | None = None
    config: Any | None = None
    model: nn.Module | None = None
    measurable: bool = True
    remote: bool = False
    chooses: bool = False
    context: int | None = None
    of_student: bool = False
    column: str | None = None
    widest: int | None = None
    vocabulary: int = 0

    def describe(self) -> str:
        """For the plan: what it is, how large it is, and what it offers."""
        return f"{type(self).__name__}, offers {self.offers.sentence}"

    def fingerprint(self) -> str:
        """Who it is: changes when its answers do. Goes into run.json, and into the keys of stores."""
        raise NotImplementedError(f"{type(self).__name__} needs a fingerprint")

    def weight_bytes(self, dtype: torch.dtype | None = None) -> float:
        """Memory in bytes of its weights in this process; `dtype` as in `load`."""
        return 0.0

    def prepare_for(self, kept: int, chosen: int) -> None:
        """Told before `check`: of its likeliest tokens the losses need `kept`, and `chosen` of the student's."""

    def check(self, tokenizer: Any) -> None:
        """Raises DpkdError when it cannot be the teacher of a student with this `tokenizer`; nothing is loaded yet."""

    def meet(self, prompts: Sequence[TeacherPrompt]) -> None:
        """`prompts` of the run's data and of its development set, once they are read; nothing is loaded yet."""

    def load(self, device: torch.device, dtype: torch.dtype | None = None) -> None:
        """Bring what it needs to answer.

        device  the student's, where the losses are computed
        dtype   of its weights, where the settings leave it open; None: as stored
        """

    def share(self, tokenizer: Any, student_rows: int) -> SharedVocabulary:
        """The ids that both predict: from here on it predicts no others.

        `tokenizer` is the student's, and `student_rows` is the number of rows of the student's output head. Raises
        DpkdError when the two do not fit.
        """
        if self.vocabulary > student_rows:
            raise DpkdError(
                f"the teacher predicts ids up to {self.vocabulary - 1:,}, but the student's output head has only "
                f"{student_rows:,} rows"
            )
        return SharedVocabulary(self.vocabulary)

    def join(self, student: nn.Module) -> None:
        """Take the `student` as it is trained, adapters included; the last call before it is asked."""

    def expect(self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]], wants: Wants) -> None:
        """Prompts and responses `sequences` that it will soon be asked to score, with the same `wants`.

        A teacher that answers from afar sends its requests now.
        """

    def statistics(self) -> Mapping[str, float]:
        """What it measured of itself since the last call, for the log."""
        return {}

    def score(self, batch: Any, wants: Wants) -> TeacherOutput:
        """What it says of the response positions of a `batch` (a `TeacherBatch`), as `wants` asks, without gradient."""
        raise NotImplementedError(f"{type(self).__name__} scores nothing")

    def text(self) -> TeacherText | None:
        """Where its own responses come from; None where it writes none."""
        return None

    def close(self) -> None:
        """Give back what lies outside this process's memory."""


@dataclass(frozen=True)
class TeacherSpec:
    """A kind of teacher, registered by the hook `dpkd_teachers`.

    name     lower-case letters and digits with dashes between: `teacher.kind`
    summary  one line
    open     makes the teacher from its own settings, before anything of it is loaded
    offer    what a teacher with these settings gives; quick, and without loading anything
    config   its own settings (`teacher.settings`), a closed and frozen block
    """

    name: str
    summary: str
    open: Callable[[Any], Teacher]
    offer: Callable[[Any], TeacherOffer]
    config: type[Block] = Block
