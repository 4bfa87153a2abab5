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
from dpkd.data.batches import Batch, TokenSequence, collate, micro_batches
from dpkd.teachers.live import TeacherRows
from dpkd.teachers.stored import StoredRows
from dpkd.text.responses import Response

__all__ = ["Stream", "Term", "Unit", "Work", "cut"]


class Term(NamedTuple):
    """A loss taken from a stream: its name, what it reads, its weight, and its denominator over the whole window."""

    name: str
    reads: frozenset[Signal]
    weight: float
    denominator: float


class Unit(NamedTuple):
    """What stays together in a micro-batch: one sequence, or the two of a pair (preferred first)."""

    sequences: tuple[TokenSequence, ...]
    responses: tuple[Response, ...] = ()


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
    teacher: TeacherRows | StoredRows | None = None
    teacher_logps: Pair | None = None
    reference_logps: Pair | None = None

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


def cut(
    stream: Stream, *, size: int, rank: int, processes: int, pad_id: int, measure: bool, device: torch.device
) -> list[Work]:
    """The stream's share of one process, longest first, in micro-batches of at most `size` sequences."""
    per_unit = 2 if stream.pairs else 1
    lengths = [max(len(s.prompt_ids) + len(s.response_ids) for s in unit.sequences) for unit in stream.units]
    groups = micro_batches(lengths, max(1, size // per_unit))
    rounds = -(-len(groups) // processes)
    works = []
    for number in range(rounds):
        mine = number * processes + rank
        units = [stream.units[i] for i in groups[mine]] if mine < len(groups) else [_IDLE] * per_unit
        if stream.pairs and mine < len(groups):
            sequences = [u.sequences[0] for u in units] + [u.sequences[1] for u in units]
            responses = [u.responses[0] for u in units] + [u.responses[1] for u in units]
        else:
            sequences = [s for unit in units for s in unit.sequences]
            responses = [r for unit in units for r in unit.responses]
        extra = {} if stream.pairs else {k: v.to(device) for k, v in _rollout_signals(units).items()}
        batch = collate(sequences, pad_id=pad_id).to(device)
        works.append(Work(stream.name, batch, stream.terms, stream.pairs, float(processes), measure, responses, extra))
    return works
