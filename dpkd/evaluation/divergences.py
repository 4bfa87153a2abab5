"""Likelihood, divergences and implicit reward on given responses: the student beside its teacher, token by token.

Shapes: N response tokens of a batch, n of one chunk, B responses, V shared vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from dpkd.api.teachers import Teacher, Wants
from dpkd.data.batches import Batch, TokenSequence, collate, micro_batches
from dpkd.functional import gather_logps, kl, log_softmax, segment_sum
from dpkd.models.chunked import chunk_rows, chunks
from dpkd.models.head import head_of, hidden_rows


@dataclass(frozen=True)
class Divergences:
    """Averages over response tokens, EOS included, in nats; those with a teacher are None without one.

    perplexity    exp of the NLL per token
    bits_per_byte NLL of the responses in bits, by the UTF-8 bytes of their text: comparable over tokenizers
    first_token_… KL at the first token of each response alone (DPKD, Table 3)
    reward_sum    implicit reward log q(y|x)/p(y|x) at β = 1 (DPKD, §4.3), mean over responses
    reward_mean   the same, each divided by the tokens of its response
    """

    tokens: int
    nll: float
    perplexity: float
    bits_per_byte: float | None = None
    teacher_nll: float | None = None
    forward_kl: float | None = None
    reverse_kl: float | None = None
    first_token_forward_kl: float | None = None
    first_token_reverse_kl: float | None = None
    reward_sum: float | None = None
    reward_mean: float | None = None

    def as_dict(self) -> dict[str, float]:
        """What is known."""
        return {key: value for key, value in asdict(self).items() if value is not None}


@dataclass
class _Rows:
    """What is known of each response token of a batch, `[N]` each, in float64 on the CPU."""

    logq: Tensor
    logp: Tensor | None
    forward: Tensor | None
    reverse: Tensor | None


@torch.no_grad()
def measure(
    student: nn.Module,
    sequences: Sequence[TokenSequence],
    *,
    teacher: Teacher | None,
    vocabulary: int,
    pad_id: int,
    text_bytes: int | None = None,
    batch_size: int = 16,
    chunk_mib: float | Literal["auto"] = "auto",
    progress: Callable[[int], None] | None = None,
) -> Divergences:
    """NLL, divergences to the teacher and implicit reward on given responses; in eval mode, which is undone after.

    `text_bytes` is the number of UTF-8 bytes of all responses together.
    """
    was_training = student.training
    student.eval()
    device = next(student.parameters()).device
    totals = _Totals()
    size = chunk_rows(vocabulary, chunk_mib, device)
    lengths = [len(s.prompt_ids) + len(s.response_ids) for s in sequences]
    try:
        for group in micro_batches(lengths, batch_size):
            batch = collate([sequences[i] for i in group], pad_id=pad_id).to(device)
            rows = _batch_rows(student, teacher, batch, vocabulary, size)
            totals.add(rows, batch.sequence.cpu(), batch.lengths.cpu())
            if progress is not None:
                progress(len(group))
    finally:
        student.train(was_training)
    return totals.result(text_bytes)


def _batch_rows(student: nn.Module, teacher: Teacher | None, batch: Batch, vocabulary: int, size: int) -> _Rows:
    hidden, head = hidden_rows(student, batch), head_of(student, vocabulary)
    teacher_rows = teacher.score(batch, Wants(size, logits=True)) if teacher is not None else None
    columns: list[list[Tensor]] = [[], [], [], []]
    for rows in chunks(len(batch.targets), size):
        log_q_nV = log_softmax(head.logits(hidden[rows]))
        columns[0].append(gather_logps(log_q_nV, batch.targets[rows]))
        if teacher_rows is not None:
            log_p_nV = log_softmax(teacher_rows.logits(rows))
            columns[1].append(gather_logps(log_p_nV, batch.targets[rows]))
            columns[2].append(kl(log_p_nV, log_q_nV))
            columns[3].append(kl(log_q_nV, log_p_nV))
    logq, logp, forward, reverse = (torch.cat(c).double().cpu() if c else None for c in columns)
    return _Rows(torch.zeros(0, dtype=torch.float64) if logq is None else logq, logp, forward, reverse)


class _Totals:
    """Sums over batches."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.tokens = self.responses = 0

    def _add(self, name: str, values: Tensor) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + float(values.sum())

    def add(self, rows: _Rows, sequence_N: Tensor, lengths_B: Tensor) -> None:
        """One batch; responses without a token are left out of the means over responses."""
        real_B = lengths_B > 0
        self.tokens += len(rows.logq)
        self.responses += int(real_B.sum())
        self._add("nll", -rows.logq)
        if rows.logp is None or rows.forward is None or rows.reverse is None:
            return
        first_N = torch.ones_like(sequence_N, dtype=torch.bool)
        first_N[1:] = sequence_N[1:] != sequence_N[:-1]
        for name, values_N in (("forward", rows.forward), ("reverse", rows.reverse)):
            self._add(name, values_N)
            self._add(f"first_{name}", values_N[first_N])
        self._add("teacher_nll", -rows.logp)
        reward_B = segment_sum(rows.logq - rows.logp, sequence_N, len(lengths_B))
        self._add("reward_sum", reward_B[real_B])
        self._add("reward_mean", (reward_B / lengths_B.clamp(min=1))[real_B])

    def result(self, text_bytes: int | None) -> Divergences:
        """The averages."""

        def over(count: int, name: str) -> float | None:
            return self.sums[name] / max(1, count) if name in self.sums else None

        nll = self.sums.get("nll", 0.0) / max(1, self.tokens)
        bits = self.sums.get("nll", 0.0) / math.log(2)
        return Divergences(
            self.tokens,
            nll,
            math.exp(min(nll, 700.0)),
            bits / text_bytes if text_bytes else None,
            over(self.tokens, "teacher_nll"),
            over(self.tokens, "forward"),
            over(self.tokens, "reverse"),
            over(self.responses, "first_forward"),
            over(self.responses, "first_reverse"),
            over(self.responses, "reward_sum"),
            over(self.responses, "reward_mean"),
        )
