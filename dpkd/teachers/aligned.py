"""A teacher with another tokenizer: it reads its own tokens of the text, and answers over both vocabularies.

Shapes: N of the teacher's response tokens, S aligned spans, n of one chunk, H hidden, U tokens of the union.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dpkd.api import TeacherAccess
from dpkd.cross_tokenizer.retokenize import AlignedBatch
from dpkd.cross_tokenizer.union_vocabulary import UnionVocabulary
from dpkd.functional import segment_sum
from dpkd.models.chunked import token_logps
from dpkd.models.head import Head
from dpkd.teachers.local import LocalTeacher


@dataclass(frozen=True)
class AlignedRows:
    """The teacher's hidden states at the first token of each span `[S, H]`, and its head.

    rest  [S] log-prob in nats of the span's other tokens, 0 where there are none
    """

    hidden: Tensor
    head: Head
    union: UnionVocabulary
    rest: Tensor

    @torch.no_grad()
    def logits(self, spans: slice) -> Tensor:
        """Logits `[n, U]` of some spans, in float32, without gradient; -inf for tokens that only the student has."""
        return self.union.of_teacher(self.head.logits(self.hidden[spans]))


class AlignedTeacher:
    """A frozen causal LM whose tokenizer is not the student's."""

    offers = TeacherAccess.LOGITS

    def __init__(self, live: LocalTeacher, union: UnionVocabulary) -> None:
        """`live` is cut to the teacher's own vocabulary."""
        self.live, self.union = live, union

    @property
    def model(self) -> torch.nn.Module:
        """The causal LM."""
        return self.live.model

    @torch.no_grad()
    def rows(self, aligned: AlignedBatch, chunk: int) -> AlignedRows:
        """What it says at each span of a batch: one forward, in its own tokens."""
        rows, at = self.live.rows(aligned.batch), aligned.teacher
        rest_R = token_logps(rows.hidden[at.rest], rows.head, aligned.batch.targets[at.rest], chunk)
        return AlignedRows(rows.hidden[at.first], rows.head, self.union, segment_sum(rest_R, at.span, len(at.first)))
