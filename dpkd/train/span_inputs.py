"""Losses across tokenizers: the rows of a chunk become the spans that begin in it.

Shapes: n rows of a chunk (the student's tokens), s spans that begin in it, U tokens of the union of both vocabularies.
"""

from __future__ import annotations

from torch import Tensor

from dpkd.api import Signal, TokenInputs
from dpkd.cross_tokenizer.retokenize import AlignedBatch
from dpkd.functional import gather_logps, log_softmax, segment_sum
from dpkd.teachers.aligned import AlignedRows
from dpkd.train.mean_metrics import MeanMetrics
from dpkd.train.microbatch import MicroBatch


def aligned_inputs(micro_batch: MicroBatch, logits_nV: Tensor, rows: slice) -> TokenInputs:
    """What a loss reads at the `s` spans of a chunk, which cuts none: so both parts of the chain rule are in it.

    The log-prob of a span is that of its first token (the target) plus the rest's: exact, with its gradient.
    """
    aligned, teacher = micro_batch.aligned, micro_batch.teacher
    assert aligned is not None
    assert isinstance(teacher, AlignedRows)
    chunk = aligned.student.within(rows)
    targets_n = micro_batch.batch.targets[rows]
    rest_r = gather_logps(log_softmax(logits_nV[chunk.rest]), targets_n[chunk.rest])
    signals = {
        Signal.STUDENT_LOGITS: teacher.union.of_student(logits_nV[chunk.first]),
        Signal.TEACHER_LOGITS: teacher.logits(chunk.spans).to(logits_nV.dtype),
        Signal.TARGETS: targets_n[chunk.first],
        Signal.STUDENT_REST: segment_sum(rest_r, chunk.span, len(chunk.first)),
        Signal.TEACHER_REST: teacher.rest[chunk.spans].to(logits_nV.dtype),
    }
    return TokenInputs(signals)


def observe_spans(aligned: AlignedBatch, tokens: int, metrics: MeanMetrics) -> None:
    """Add the share of the student's tokens that lie in spans, and of spans that are one token to both models."""
    spans = len(aligned.student.first)
    metrics.add("spans/covered", float(spans + len(aligned.student.rest)), float(tokens))
    several = set(aligned.student.span.tolist()) | set(aligned.teacher.span.tolist())
    metrics.add("spans/single", float(spans - len(several)), float(spans))
