"""Likelihood and divergences on given responses: the student beside its teacher, token by token.

Shapes: N response tokens of a batch, n of one chunk, V shared vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import nn

from dpkd.data.batches import Batch, TokenSequence, collate, micro_batches
from dpkd.functional import gather_logps, kl, log_softmax
from dpkd.models.chunked import chunk_rows, chunks
from dpkd.models.head import head_of, hidden_rows
from dpkd.teachers.live import LiveTeacher

__all__ = ["Divergences", "measure"]


@dataclass(frozen=True)
class Divergences:
    """Averages over response tokens, EOS included, in nats; those with a teacher are None without one."""

    tokens: int
    nll: float
    perplexity: float
    teacher_nll: float | None = None
    forward_kl: float | None = None
    reverse_kl: float | None = None

    def as_dict(self) -> dict[str, float]:
        """What is known."""
        return {key: value for key, value in asdict(self).items() if value is not None}


@torch.no_grad()
def measure(
    student: nn.Module,
    sequences: Sequence[TokenSequence],
    *,
    teacher: LiveTeacher | None,
    vocabulary: int,
    pad_id: int,
    batch_size: int = 16,
    chunk_mib: float = 32.0,
    progress: Callable[[int], None] | None = None,
) -> Divergences:
    """NLL, and KL(p‖q) and KL(q‖p) to the teacher, on given responses; in eval mode, which is undone after."""
    was_training = student.training
    student.eval()
    device = next(student.parameters()).device
    totals = torch.zeros(4, dtype=torch.float64)
    tokens = 0
    lengths = [len(s.prompt_ids) + len(s.response_ids) for s in sequences]
    try:
        for group in micro_batches(lengths, batch_size):
            batch = collate([sequences[i] for i in group], pad_id=pad_id).to(device)
            totals += _batch_totals(student, teacher, batch, vocabulary, chunk_rows(vocabulary, chunk_mib))
            tokens += len(batch.targets)
            if progress is not None:
                progress(len(group))
    finally:
        student.train(was_training)
    nll, teacher_nll, forward, reverse = (totals / max(1, tokens)).tolist()
    perplexity = float(torch.tensor(nll).exp())
    if teacher is None:
        return Divergences(tokens, nll, perplexity)
    return Divergences(tokens, nll, perplexity, teacher_nll, forward, reverse)


def _batch_totals(
    student: nn.Module, teacher: LiveTeacher | None, batch: Batch, vocabulary: int, size: int
) -> torch.Tensor:
    """Sums over a batch: NLL of student and teacher, forward and reverse KL, `[4]`."""
    hidden, head = hidden_rows(student, batch), head_of(student, vocabulary)
    teacher_rows = teacher.rows(batch) if teacher is not None else None
    totals = torch.zeros(4, dtype=torch.float64)
    for rows in chunks(len(batch.targets), size):
        log_q_nV = log_softmax(head.logits(hidden[rows]))
        totals[0] -= gather_logps(log_q_nV, batch.targets[rows]).double().sum().cpu()
        if teacher_rows is not None:
            log_p_nV = log_softmax(teacher_rows.logits(rows))
            totals[1] -= gather_logps(log_p_nV, batch.targets[rows]).double().sum().cpu()
            totals[2] += kl(log_p_nV, log_q_nV).double().sum().cpu()
            totals[3] += kl(log_q_nV, log_p_nV).double().sum().cpu()
    return totals
