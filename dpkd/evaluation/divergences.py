"""Given responses under a student and its teacher, token by token, in float64.

Shapes: N response tokens of all sequences, n of one chunk, V shared vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from dpkd.api import TokenScores
from dpkd.api.teachers import Teacher, Wants
from dpkd.data.batches import Batch, TokenSequence, collate, micro_batches
from dpkd.errors import DpkdError
from dpkd.functional import gather_logps, kl, log_softmax
from dpkd.models.chunked import chunk_rows, chunks
from dpkd.models.head import evaluating, head_of, hidden_rows

# In the order of the columns of `_batch_columns`.
_COLUMNS = ("logq_N", "logp_N", "forward_kl_N", "reverse_kl_N")


# Rows of a batch. On a GPU a small batch takes as long as the host needs to ask for it: there it is filled with tokens.
ROWS, ROWS_OF_GPU, TOKENS_OF_GPU = 16, 256, 32_768


def _limits(batch_size: int | None, device: torch.device) -> tuple[int, int | None]:
    """Rows and tokens that a batch has at most."""
    if batch_size is not None:
        return batch_size, None
    return (ROWS_OF_GPU, TOKENS_OF_GPU) if device.type == "cuda" else (ROWS, None)


@torch.no_grad()
def measure(
    student: nn.Module,
    sequences: Sequence[TokenSequence],
    *,
    teacher: Teacher | None,
    vocabulary: int,
    pad_id: int,
    text_bytes: int | None = None,
    batch_size: int | None = None,
    chunk_mib: float | Literal["auto"] = "auto",
    progress: Callable[[int], None] | None = None,
) -> TokenScores:
    """Log-probs and divergences of given responses; in eval mode, which is restored afterwards.

    `text_bytes` is the number of UTF-8 bytes of all responses together, `batch_size` that of the sequences of a batch
    (None: as `_limits` has it). Raises DpkdError when a model gives a response a log-prob that is not finite, or there
    is no response token at all.
    """
    device = next(student.parameters()).device
    size = chunk_rows(vocabulary, chunk_mib, device)
    lengths = [len(s.prompt_ids) + len(s.response_ids) for s in sequences]
    columns: list[list[Any]] = [[] for _ in _COLUMNS]
    owners: list[Any] = []
    with evaluating(student):
        for group in micro_batches(lengths, *_limits(batch_size, device)):
            batch = collate([sequences[i] for i in group], pad_id=pad_id).to(device)
            for own, values in zip(columns, _batch_columns(student, teacher, batch, vocabulary, size), strict=True):
                own.extend(values)
            owners.append(np.asarray(group)[batch.sequence.cpu().numpy()])
            if progress is not None:
                progress(len(group))
    sequence_N = np.concatenate(owners) if owners else np.zeros(0, dtype=int)
    if not len(sequence_N):
        raise DpkdError("no response has a token: there is no likelihood to compute")
    order = np.argsort(sequence_N, kind="stable")
    found = {name: np.concatenate(own)[order] for name, own in zip(_COLUMNS, columns, strict=True) if own}
    _check_finite(found)
    return TokenScores(sequence_N=sequence_N[order], text_bytes=text_bytes, **found)


def _batch_columns(
    student: nn.Module, teacher: Teacher | None, batch: Batch, vocabulary: int, size: int
) -> list[list[Any]]:
    """The columns of a batch as lists of chunks; those of a teacher are empty without one."""
    hidden, head = hidden_rows(student, batch), head_of(student, vocabulary)
    teacher_rows = teacher.score(batch, Wants(size, logits=True)) if teacher is not None else None
    columns: list[list[Tensor]] = [[] for _ in _COLUMNS]
    for rows in chunks(len(batch.targets), size):
        log_q_nV = log_softmax(head.logits(hidden[rows]))
        columns[0].append(gather_logps(log_q_nV, batch.targets[rows]))
        if teacher_rows is not None:
            log_p_nV = log_softmax(teacher_rows.logits(rows))
            columns[1].append(gather_logps(log_p_nV, batch.targets[rows]))
            columns[2].append(kl(log_p_nV, log_q_nV))
            columns[3].append(kl(log_q_nV, log_p_nV))
    return [[part.double().cpu().numpy() for part in column] for column in columns]


def _check_finite(found: dict[str, Any]) -> None:
    for name, who in (("logq_N", "model"), ("logp_N", "teacher")):
        bad = int((~np.isfinite(found[name])).sum()) if name in found else 0
        if bad:
            raise DpkdError(
                f"the {who} gives {bad:,} of {len(found[name]):,} reference tokens a log-prob that is not finite: "
                "its weights are damaged, or overflow in this type. Check the weights, or try --dtype float32"
            )
