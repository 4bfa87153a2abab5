"""The student's own base as its teacher: its adapters are switched off for a forward, and there is no second copy."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dpkd.api import TeacherAccess, TeacherOffer
from dpkd.api.teachers import SharedVocabulary, Teacher, Wants
from dpkd.cross_tokenizer.retokenize import AlignedBatch
from dpkd.data.batches import Batch
from dpkd.models.head import evaluating, head_of
from dpkd.models.layers import layer_rows
from dpkd.teachers.local import TeacherRows

OFFER = TeacherOffer(TeacherAccess.LOGITS, what="the student's own base", writes=False)


class BaseTeacher(Teacher):
    """The model that the student's adapters were added to."""

    offers = OFFER.access
    of_student = True

    def describe(self) -> str:
        return f"the student with its adapters switched off, no second copy, offers {self.offers.sentence}"

    def fingerprint(self) -> str:
        return "base of the student"

    def share(self, tokenizer: Any, student_rows: int) -> SharedVocabulary:
        self.vocabulary = student_rows
        return SharedVocabulary(student_rows)

    def join(self, student: nn.Module) -> None:
        self._student = student

    @torch.no_grad()
    def score(self, batch: Batch | AlignedBatch, wants: Wants) -> TeacherRows:
        """One forward of the student's backbone without adapters; the output head has none."""
        assert isinstance(batch, Batch)
        student: Any = self._student
        device = next(student.parameters()).device
        with evaluating(student), student.disable_adapter():
            hidden, states = layer_rows(student, batch.to(device), wants.layers)
        head = head_of(student, self.vocabulary)
        return TeacherRows(hidden, head, batch.targets.to(device), wants.chunk, states)
