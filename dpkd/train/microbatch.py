"""One micro-batch: what the student is run on, and which losses are taken from it.

A step batch is the text of one purpose within an optimizer step: `main` (the objective), `lm` (data-set responses) and
`pretrain` (plain text). Each step batch knows its own denominators before the first forward, because the text is final.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from dpkd.api import Response, Signal, Text
from dpkd.api.inputs import TEACHER_LOGPS
from dpkd.api.teachers import TeacherOutput, Wants
from dpkd.cross_tokenizer.retokenize import IDLE_ALIGNED, AlignedBatch, AlignedSequence, collate_aligned
from dpkd.data.batches import PLAIN, Batch, Layout, TokenSequence, collate, micro_batches, upload
from dpkd.functional import reduce_loss


class Term(NamedTuple):
    """A loss of a step batch: its name, what it reads, its weight, and its denominator over the whole window.

    `of_chosen`: the likelihood of the chosen responses of pairs, whose log-probs the pairs' own pass computes.
    """

    name: str
    reads: frozenset[Signal]
    weight: float
    denominator: float
    of_chosen: bool = False

    def share(self, values: Tensor, processes: float) -> Tensor:
        """What the values of a micro-batch add to the objective.

        Gradients are averaged over the processes, and the denominator counts the rows of all of them.
        """
        return reduce_loss(values, self.denominator, self.weight * processes)


class PromptGroup(NamedTuple):
    """What stays together in a micro-batch: the sequences of one prompt; of a pair two (chosen first).

    `aligned` is the sequence as a teacher with another tokenizer reads it.
    """

    sequences: tuple[TokenSequence, ...]
    responses: tuple[Response, ...] = ()
    aligned: AlignedSequence | None = None


@dataclass(frozen=True)
class StepBatch:
    """The groups of one purpose in an optimizer step, over all processes."""

    name: str
    groups: Sequence[PromptGroup]
    terms: Sequence[Term]
    pairs: bool = False

    @property
    def tokens(self) -> int:
        """Response tokens."""
        return sum(len(s.response_ids) for group in self.groups for s in group.sequences)


@dataclass(frozen=True)
class MicroBatch:
    """One forward of the student."""

    name: str  # of its step batch
    batch: Batch
    terms: Sequence[Term]
    pairs: bool
    processes: float
    measure: bool
    responses: Sequence[Response] = ()
    extra: Mapping[Signal, Tensor] = field(default_factory=dict)
    teacher: TeacherOutput | None = None
    measurable: bool = False  # whether that is the whole distribution at every row
    teacher_logps: Tensor | None = None  # of the response tokens [N], for pairs
    reference_logps: Tensor | None = None
    aligned: AlignedBatch | None = None  # where the teacher has another tokenizer and a loss reads it

    def reads(self, *signals: Signal) -> bool:
        """Whether a term of this micro-batch reads one of the signals."""
        return any(signal in term.reads for term in self.terms for signal in signals)

    @property
    def real_pairs(self) -> list[int] | None:
        """The pairs that have a chosen response: None for all. The stand-in of an idle process has none."""
        real = [i for i, sequence in enumerate(self._chosen) if sequence.predicted]
        return None if len(real) == len(self._chosen) else real

    @property
    def chosen_tokens(self) -> int:
        """Response tokens of the chosen ones that have a row."""
        return sum(sequence.predicted for sequence in self._chosen)

    @property
    def _chosen(self) -> Sequence[TokenSequence]:
        return self.batch.sequences[: len(self.batch.sequences) // 2]

    @property
    def measured(self) -> bool:
        """Whether divergences are logged: those of the main loss's responses."""
        return self.measure and self.name == "main"

    def wants(self, layers: Sequence[int], chunk: int, *, measurable: bool) -> Wants:
        """What its losses, and the log, need of a teacher; `measurable`: of one that has whole distributions."""
        measured = self.measured and measurable
        # What a rollout loss reads of the drawn tokens was computed when they were drawn.
        logps = self.pairs and (self.reads(*TEACHER_LOGPS) or measured)
        logits = not self.pairs and self.reads(Signal.TEACHER_LOGITS)
        return Wants(chunk, logps, logits or measured, tuple(layers))


def _rollout_signals(groups: Sequence[PromptGroup]) -> dict[Signal, Tensor]:
    """What was known about each token when it was sampled, packed like the rows of the batch."""
    kept = {
        Signal.ROLLOUT_LOGPS: "rollout_logps",
        Signal.BEHAVIOUR_LOGPS: "behaviour_logps",
        Signal.TEACHER_LOGPS: "teacher_logps",
        Signal.ADVANTAGES: "advantages",
    }
    signals = {}
    for signal, attribute in kept.items():
        columns = [getattr(response, attribute) for group in groups for response in group.responses]
        if columns and all(column is not None for column in columns):
            signals[signal] = torch.cat(columns)
    return signals


# A process with nothing to do in a round still runs a forward, so that the processes stay in step: one masked token.
_IDLE = PromptGroup((TokenSequence((0,), ()),))


# Another layout than the usual one costs attention with a mask; below this share of tokens saved it does not pay.
WORTH_SAVING = 0.1


@dataclass(frozen=True)
class MicroBatcher:
    """Cuts the step batches of a step into the micro-batches of one process. Nothing here changes a result."""

    size: int  # sequences of a micro-batch
    pad_id: int
    tokens: int | None = None  # tokens of a micro-batch, padding included
    layouts: tuple[Layout, ...] = (PLAIN,)  # that the models read: the usual one, and others for fewer tokens
    rank: int = 0
    processes: int = 1
    device: torch.device | str = "cpu"
    teacher_pad_id: int = 0  # of a teacher with another tokenizer

    def __call__(self, step_batch: StepBatch, measure: bool) -> list[MicroBatch]:
        """The step batch's share of this process, longest first."""
        layout, shares = self._layout(step_batch)
        micro_batches = []
        for number in range(-(-len(shares) // self.processes)):
            mine = number * self.processes + self.rank
            groups = [step_batch.groups[i] for i in shares[mine]] if mine < len(shares) else []
            micro_batches.append(self._micro_batch(step_batch, groups, layout, measure))
        return micro_batches

    def _layout(self, step_batch: StepBatch) -> tuple[Layout, list[list[int]]]:
        """How the sequences of a step batch become rows, with the groups of each micro-batch of all processes."""
        (first, shares), *others = [(layout, self._shares(step_batch, layout)) for layout in self.layouts]
        tokens = (1 - WORTH_SAVING) * _tokens(step_batch.groups, shares, first)
        for other, its in others:
            if (fewer := _tokens(step_batch.groups, its, other)) < tokens:
                first, shares, tokens = other, its, fewer
        return first, shares

    def _shares(self, step_batch: StepBatch, layout: Layout) -> list[list[int]]:
        """The groups of each micro-batch of all processes."""
        per_unit = max((len(group.sequences) for group in step_batch.groups), default=1)
        tokens, lengths = self.tokens, [max(_lengths(group)) for group in step_batch.groups]
        if layout.shared:
            lengths = [_shared_length(group) for group in step_batch.groups]
        elif layout.packed:
            lengths = [sum(_lengths(group)) for group in step_batch.groups]
        elif tokens is not None:
            tokens = tokens // per_unit
        return micro_batches(lengths, max(1, self.size // per_unit), tokens, packed=layout.packed)

    def _micro_batch(
        self, step_batch: StepBatch, groups: Sequence[PromptGroup], layout: Layout, measure: bool
    ) -> MicroBatch:
        """The micro-batch of some groups; with none, the process idles along."""
        responses: list[Response] = []
        if step_batch.pairs and groups:
            sequences = [u.sequences[0] for u in groups] + [u.sequences[1] for u in groups]
            responses = [u.responses[0] for u in groups] + [u.responses[1] for u in groups]
        else:
            idle = [_IDLE] * (2 if step_batch.pairs else 1)
            sequences = [s for group in groups or idle for s in group.sequences]
            responses = [r for group in groups for r in group.responses]
        batch = collate(sequences, pad_id=self.pad_id, layout=layout)
        extra = {}
        if not step_batch.pairs:
            extra = _rollout_signals(groups)
            if any(Signal.BY_STUDENT in term.reads for term in step_batch.terms):
                wrote = torch.tensor([response.writer is Text.STUDENT for response in responses], dtype=torch.bool)
                extra[Signal.BY_STUDENT] = wrote[batch.sequence]
        aligned = _aligned(step_batch, groups or [_IDLE], self.teacher_pad_id)
        return MicroBatch(
            step_batch.name,
            batch.to(self.device),
            step_batch.terms,
            step_batch.pairs,
            float(self.processes),
            measure,
            responses,
            {signal: upload(values, self.device) for signal, values in extra.items()},
            aligned=None if aligned is None else aligned.to(self.device),
        )


def _aligned(step_batch: StepBatch, groups: Sequence[PromptGroup], teacher_pad_id: int) -> AlignedBatch | None:
    """What the teacher reads of these groups; None where it reads what the student reads."""
    if not any(group.aligned is not None for group in step_batch.groups):
        return None
    sequences = [group.sequences[0] for group in groups]
    return collate_aligned(sequences, [group.aligned or IDLE_ALIGNED for group in groups], pad_id=teacher_pad_id)


def _lengths(group: PromptGroup) -> list[int]:
    return [len(s.prompt_ids) + len(s.response_ids) for s in group.sequences]


def _shared_length(group: PromptGroup) -> int:
    """Tokens of a group whose sequences stand behind one copy of their prompt."""
    return len(group.sequences[0].prompt_ids) + sum(len(s.response_ids) for s in group.sequences)


def _tokens(groups: Sequence[PromptGroup], shares: Sequence[Sequence[int]], layout: Layout) -> int:
    """Tokens of the micro-batches of a layout; padding between rows counts."""
    total = 0
    for share in shares:
        if layout.shared:
            widths = [_shared_length(groups[i]) for i in share]
        else:
            widths = [length for i in share for length in _lengths(groups[i])]
        total += sum(widths) if layout.packed else len(widths) * max(widths, default=0)
    return total
