"""A teacher with another tokenizer: it reads its own tokens of the text, and answers over both vocabularies.

Shapes: N of the teacher's response tokens, S aligned spans, n of one chunk, H hidden, U tokens of the union.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dpkd.api import Signal, TeacherAccess
from dpkd.cross_tokenizer.retokenize import AlignedBatch
from dpkd.cross_tokenizer.union_vocabulary import UnionVocabulary
from dpkd.data.batches import Batch
from dpkd.functional import gather_logps, log_softmax, segment_sum
from dpkd.models.chunked import token_logps
from dpkd.teachers.base import Wants
from dpkd.teachers.local import LocalTeacher, TeacherRows


@dataclass(frozen=True)
class AlignedRows:
    """What the teacher says at each span: `rows` of its own tokens, and `batch`, which says which belong together."""

    rows: TeacherRows
    batch: AlignedBatch
    union: UnionVocabulary
    rest: Tensor  # [S] log-prob in nats of the span's tokens after its first, 0 where there are none
    layers: Mapping[int, Tensor] = field(default_factory=dict)  # hidden states are token by token

    @torch.no_grad()
    def logits(self, rows: slice) -> Tensor:
        """Logits `[n, U]` at the first token of some spans, float32; -inf for tokens that only the student has."""
        return self.union.of_teacher(self.rows.head.logits(self.rows.hidden[self.batch.teacher.first[rows]]))

    def raw(self, rows: slice) -> tuple[Tensor, float]:
        """The same logits, and the factor 1."""
        return self.logits(rows), 1.0

    def logps(self) -> Tensor:
        """Log-prob in nats of each of the teacher's own response tokens."""
        return self.rows.logps()

    def signals(self, student_logits_nV: Tensor, targets_n: Tensor, rows: slice) -> Mapping[Signal, Tensor]:
        """What a loss reads at the `s` spans of a chunk, which cuts none: so both parts of the chain rule are in it.

        The log-prob of a span is that of its first token (the target) plus the rest's: exact, with its gradient.
        """
        chunk = self.batch.student.within(rows)
        rest_r = gather_logps(log_softmax(student_logits_nV[chunk.rest]), targets_n[chunk.rest])
        wide = student_logits_nV.dtype
        return {
            Signal.STUDENT_LOGITS: self.union.of_student(student_logits_nV[chunk.first]),
            Signal.TEACHER_LOGITS: self.logits(chunk.spans).to(wide),
            Signal.TARGETS: targets_n[chunk.first],
            Signal.STUDENT_REST: segment_sum(rest_r, chunk.span, len(chunk.first)),
            Signal.TEACHER_REST: self.rest[chunk.spans].to(wide),
        }

    def is_finite(self) -> bool:
        """Whether hidden states are: over a union of vocabularies, logits of -inf are no fault."""
        return bool(torch.isfinite(self.rows.hidden).all())


class AlignedTeacher:
    """A frozen causal LM whose tokenizer is not the student's."""

    offers = TeacherAccess.LOGITS
    measurable = False

    def __init__(self, local: LocalTeacher, union: UnionVocabulary) -> None:
        """`local` is cut to the teacher's own vocabulary."""
        self.local, self.union = local, union
        self.model, self.widest = local.model, union.size

    @torch.no_grad()
    def score(self, batch: Batch | AlignedBatch, wants: Wants) -> AlignedRows:
        """What it says at each span of a batch: one forward, in its own tokens."""
        assert isinstance(batch, AlignedBatch)
        rows, at = self.local.score(batch.batch, wants), batch.teacher
        rest_R = token_logps(rows.hidden[at.rest], rows.head, rows.targets[at.rest], wants.chunk)
        return AlignedRows(rows, batch, self.union, segment_sum(rest_R, at.span, len(at.first)))
