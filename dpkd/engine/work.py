"""One micro-batch of work: what the student is run on, and which losses are taken from it.

A stream is the text of one purpose within an optimiser step: `main` (the objective), `lm` (data-set responses) and
`pretrain` (plain text). Each stream knows its own denominators before the first forward, because the text is final.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from dpkd.api import Pair, Signal
from dpkd.data.batches import PLAIN, Batch, Layout, TokenSequence, collate, micro_batches
from dpkd.data.twins import IDLE_TWIN, Twin, TwinBatch, collate_twins
from dpkd.teachers.aligned import AlignedRows
from dpkd.teachers.live import TeacherRows
from dpkd.teachers.stored import StoredRows
from dpkd.text.responses import Response

__all__ = ["Cutter", "Stream", "Term", "Unit", "Work"]


class Term(NamedTuple):
    """A loss taken from a stream: its name, what it reads, its weight, and its denominator over the whole window."""

    name: str
    reads: frozenset[Signal]
    weight: float
    denominator: float


class Unit(NamedTuple):
    """What stays together in a micro-batch: the sequences of one prompt; of a pair two (preferred first).

    `twin` is the sequence as a teacher with another tokenizer reads it.
    """

    sequences: tuple[TokenSequence, ...]
    responses: tuple[Response, ...] = ()
    twin: Twin | None = None


@dataclass(frozen=True)
class Stream:
    """The units of one purpose in an optimiser step, over all processes."""

    name: str
    units: Sequence[Unit]
    terms: Sequence[Term]
    pairs: bool = False


@dataclass(frozen=True)
class Work:
    """One forward of the student."""

    stream: str
    batch: Batch
    terms: Sequence[Term]
    pairs: bool
    scale: float  # number of processes: their gradients are averaged, and the denominators count all of them
    measure: bool
    responses: Sequence[Response] = ()
    extra: Mapping[Signal, Tensor] = field(default_factory=dict)
    teacher: TeacherRows | StoredRows | AlignedRows | None = None
    teacher_logps: Pair | None = None
    reference_logps: Pair | None = None
    twins: TwinBatch | None = None  # where the teacher has another tokenizer and a loss reads it

    def needs_teacher(self, signal: Signal) -> bool:
        """Whether a term of this work reads a signal."""
        return any(signal in term.reads for term in self.terms)


def _rollout_signals(units: Sequence[Unit]) -> dict[Signal, Tensor]:
    """What was known about each token when it was sampled, packed like the rows of the batch."""
    kept = {
        Signal.ROLLOUT_LOGPS: "rollout_logps",
        Signal.BEHAVIOUR_LOGPS: "behaviour_logps",
        Signal.TEACHER_LOGPS: "teacher_logps",
        Signal.ADVANTAGES: "advantages",
    }
    signals = {}
    for signal, attribute in kept.items():
        columns = [getattr(response, attribute) for unit in units for response in unit.responses]
        if columns and all(column is not None for column in columns):
            signals[signal] = torch.tensor([value for column in columns for value in column])
    return signals


# A process with nothing to do in a round still runs a forward, so that the processes stay in step: one masked token.
_IDLE = Unit((TokenSequence((0,), ()),))


# Sharing a prompt costs attention over all responses to it; below this share of tokens saved it does not pay.
WORTH_SHARING = 0.1


@dataclass(frozen=True)
class Cutter:
    """Cuts the streams of a step into the micro-batches of one process. Nothing here changes a result."""

    size: int  # sequences of a micro-batch
    pad_id: int
    tokens: int | None = None  # tokens of a micro-batch, padding included
    layout: Layout = PLAIN
    rank: int = 0
    processes: int = 1
    device: torch.device | str = "cpu"
    teacher_pad_id: int = 0  # of a teacher with another tokenizer

    def __call__(self, stream: Stream, measure: bool) -> list[Work]:
        """The stream's share of this process, longest first."""
        layout = self.layout._replace(shared=self.layout.shared and _worth_sharing(stream.units))
        groups = self._groups(stream, layout)
        works = []
        for number in range(-(-len(groups) // self.processes)):
            mine = number * self.processes + self.rank
            units = [stream.units[i] for i in groups[mine]] if mine < len(groups) else []
            works.append(self._work(stream, units, layout, measure))
        return works

    def _groups(self, stream: Stream, layout: Layout) -> list[list[int]]:
        """The units of each micro-batch of all processes."""
        per_unit = max((len(unit.sequences) for unit in stream.units), default=1)
        size, tokens, lengths = max(1, self.size // per_unit), self.tokens, [max(_lengths(u)) for u in stream.units]
        if layout.shared:
            lengths = [_shared_length(unit) for unit in stream.units]
        elif layout.packed:
            lengths = [sum(_lengths(unit)) for unit in stream.units]
        elif tokens is not None:
            tokens = tokens // per_unit
        return micro_batches(lengths, size, tokens, packed=layout.packed)

    def _work(self, stream: Stream, units: Sequence[Unit], layout: Layout, measure: bool) -> Work:
        """The micro-batch of some units; with none, the process idles along."""
        responses: list[Response] = []
        if stream.pairs and units:
            sequences = [u.sequences[0] for u in units] + [u.sequences[1] for u in units]
            responses = [u.responses[0] for u in units] + [u.responses[1] for u in units]
        else:
            idle = [_IDLE] * (2 if stream.pairs else 1)
            sequences = [s for unit in units or idle for s in unit.sequences]
            responses = [r for unit in units for r in unit.responses]
        extra = {} if stream.pairs else {k: v.to(self.device) for k, v in _rollout_signals(units).items()}
        batch = collate(sequences, pad_id=self.pad_id, layout=layout).to(self.device)
        twins = _twins(stream, units or [_IDLE], self.teacher_pad_id)
        return Work(
            stream.name, batch, stream.terms, stream.pairs, float(self.processes), measure, responses, extra,
            twins=None if twins is None else twins.to(self.device),
        )  # fmt: skip


def _twins(stream: Stream, units: Sequence[Unit], teacher_pad_id: int) -> TwinBatch | None:
    """What the teacher reads of these units; None where it reads what the student reads."""
    if not any(unit.twin is not None for unit in stream.units):
        return None
    sequences = [unit.sequences[0] for unit in units]
    return collate_twins(sequences, [unit.twin or IDLE_TWIN for unit in units], pad_id=teacher_pad_id)


def _lengths(unit: Unit) -> list[int]:
    return [len(s.prompt_ids) + len(s.response_ids) for s in unit.sequences]


def _shared_length(unit: Unit) -> int:
    """Tokens of a unit whose sequences stand behind one copy of their prompt."""
    return len(unit.sequences[0].prompt_ids) + sum(len(s.response_ids) for s in unit.sequences)


def _worth_sharing(units: Sequence[Unit]) -> bool:
    apart = sum(sum(_lengths(unit)) for unit in units)
    return apart - sum(_shared_length(unit) for unit in units) > WORTH_SHARING * apart
