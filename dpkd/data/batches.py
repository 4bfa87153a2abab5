"""Sequences to tensors: the one place where prompts and responses are joined, padded, shifted and masked.

Shapes: B sequences, T tokens of the longest, N response tokens of the whole batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal, NamedTuple

import torch
from torch import Tensor

__all__ = ["Batch", "TokenSequence", "collate", "micro_batches"]


class TokenSequence(NamedTuple):
    """Ids of a prompt and of a response (its EOS included)."""

    prompt_ids: Sequence[int]
    response_ids: Sequence[int]

    def __repr__(self) -> str:
        return f"TokenSequence({len(self.prompt_ids)} + {len(self.response_ids)} ids)"


@dataclass(frozen=True)
class Batch:
    """Padded sequences, and the packed rows of their response tokens.

    input_ids, attention_mask, position_ids  [B, T]
    rows      [N] flat index (b · T + t) of the hidden state that predicts each response token
    targets   [N] that token
    sequence  [N] the sequence that it belongs to
    lengths   [B] response tokens of each sequence
    """

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    rows: Tensor
    targets: Tensor
    sequence: Tensor
    lengths: Tensor

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        return Batch(**{f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)})


def collate(
    sequences: Sequence[TokenSequence],
    *,
    pad_id: int,
    side: Literal["right", "left"] = "right",
    extra: int = 0,
) -> Batch:
    """One batch, padded to its longest sequence (plus `extra`); side and extra never change a value.

    A token is trained because of its place, never because of its id: a pad that equals EOS hides no EOS. The hidden
    state at position t predicts token t + 1: this is the only shift in dpkd. A response token with nothing before it
    (an empty prompt) has no row.
    """
    longest = max((len(s.prompt_ids) + len(s.response_ids) for s in sequences), default=0) + extra
    shape = (len(sequences), longest)
    input_ids = torch.full(shape, pad_id, dtype=torch.long)
    attention_mask = torch.zeros(shape, dtype=torch.long)
    position_ids = torch.zeros(shape, dtype=torch.long)
    rows, targets, sequence, lengths = [], [], [], []
    for b, (prompt, response) in enumerate(sequences):
        ids = [*prompt, *response]
        start = 0 if side == "right" else longest - len(ids)
        input_ids[b, start : start + len(ids)] = torch.tensor(ids, dtype=torch.long)
        attention_mask[b, start : start + len(ids)] = 1
        position_ids[b, start : start + len(ids)] = torch.arange(len(ids))
        first = max(len(prompt), 1)
        at = range(first, len(ids))
        rows += [b * longest + start + t - 1 for t in at]
        targets += [ids[t] for t in at]
        sequence += [b] * len(at)
        lengths.append(len(at))
    numbers = (torch.tensor(x, dtype=torch.long) for x in (rows, targets, sequence, lengths))
    return Batch(input_ids, attention_mask, position_ids, *numbers)


def micro_batches(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Indices of a window, longest first, cut into micro-batches of at most `size`: little padding.

    >>> micro_batches([3, 9, 4, 8], 2)
    [[1, 3], [2, 0]]
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    return [order[i : i + size] for i in range(0, len(order), size)]
