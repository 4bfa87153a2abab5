"""A teacher with another tokenizer: it reads its own tokens of the text, and answers over both vocabularies.

Shapes: N of the teacher's response tokens, S aligned spans, s of those in one chunk, H hidden, U tokens of the union.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dpkd.api import Signal, TeacherAccess
from dpkd.api.teachers import SharedVocabulary, Teacher, TeacherOutput, TeacherText, Wants
from dpkd.cross_tokenizer.retokenize import AlignedBatch, Retokenizer
from dpkd.cross_tokenizer.union_vocabulary import unite
from dpkd.data.batches import Batch
from dpkd.functional import gather_logps, log_softmax, segment_sum
from dpkd.models.chunked import token_logps
from dpkd.teachers.local import LocalTeacher, TeacherRows


class AlignedRows(TeacherOutput):
    """What the teacher says at each span: `rows` of its own tokens, and `batch`, which says which belong together.

    rest  [S] log-prob in nats of the span's tokens after its first, 0 where there are none
    """

    def __init__(self, rows: TeacherRows, batch: AlignedBatch, union: Any) -> None:
        super().__init__(rows.targets, rows.chunk)
        self.rows, self.batch, self.union = rows, batch, union
        at = batch.teacher
        rest_R = token_logps(rows.hidden[at.rest], rows.head, rows.targets[at.rest], rows.chunk)
        self.rest = segment_sum(rest_R, at.span, len(at.first))

    @torch.no_grad()
    def logits(self, rows: slice) -> Tensor:
        """Logits `[s, U]` at the first token of some spans, float32; -inf for tokens that only the student has."""
        hidden = self.rows.hidden[self.batch.teacher.first[rows]]
        return self.union.of_teacher(self.rows.head.logits(hidden))  # type: ignore[no-any-return]

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


class AlignedTeacher(Teacher):
    """A causal LM whose tokenizer is not the student's: both are compared at spans of text that both delimit."""

    offers = TeacherAccess.LOGITS
    measurable = False

    def __init__(self, local: Teacher, retokenizer: Retokenizer) -> None:
        assert isinstance(local, LocalTeacher)  # no other kind has a tokenizer of its own
        self.local, self.retokenizer = local, retokenizer
        self.tokenizer, self.config = local.tokenizer, local.config

    @property
    def model(self) -> nn.Module | None:  # type: ignore[override]
        """The causal LM."""
        return self.local.model

    def describe(self) -> str:
        return self.local.describe()

    def fingerprint(self) -> str:
        return self.local.fingerprint()

    def weight_bytes(self, dtype: torch.dtype | None = None) -> float:
        return self.local.weight_bytes(dtype)

    def load(self, device: torch.device, dtype: torch.dtype | None = None) -> None:
        self._device = device
        self.local.load(device, dtype)

    def share(self, tokenizer: Any, student_rows: int) -> SharedVocabulary:
        """Each keeps its own ids; losses see the union of both."""
        union = unite(self.retokenizer.student, self.retokenizer.teacher, student_rows, self.local.vocabulary)
        self.local.cut(union.teacher)
        self.widest, self.vocabulary = union.size, union.teacher
        self.union = union.to(self._device)
        return SharedVocabulary(union.student)

    @torch.no_grad()
    def score(self, batch: Batch | AlignedBatch, wants: Wants) -> AlignedRows:
        """What it says at each span of a batch: one forward, in its own tokens."""
        assert isinstance(batch, AlignedBatch)
        return AlignedRows(self.local.score(batch.batch, wants), batch, self.union)

    def text(self) -> TeacherText:
        return self.local.text()
