"""What models give for the tokens of a batch, at the tokens that have a label.

Shapes: B sequences, T tokens, V vocabulary, H hidden, N labeled tokens, P pairs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dpkd.api import Pair
from dpkd.data.batches import LabeledRows, labeled_rows
from dpkd.errors import DpkdError
from dpkd.functional import by_segment, gather_logps, log_softmax, segment_sum
from dpkd.models import chunked
from dpkd.models.head import Head, LogitRule, head_of

CHUNK_MIB = 32.0


@dataclass(frozen=True)
class Output:
    """Logits `[..., V]` of a model, or hidden states `[..., H]` with the head that makes logits of them.

    Leading dimensions are `[B, T]`, or `[N]` at the labeled tokens.
    """

    values: Tensor
    head: Head | None = None

    @property
    def vocabulary(self) -> int:
        """The ids that there are logits for."""
        return self.values.shape[-1] if self.head is None else len(self.head.weight)

    def at(self, rows_N: Tensor, vocabulary: int | None = None) -> Output:
        """The output `[N]` at flat indices, cut to the first ids."""
        values = take(self.values, rows_N)
        return Output(values[:, :vocabulary]) if self.head is None else Output(values, self.head.cut(vocabulary))

    def logits(self, rows: slice) -> Tensor:
        """Logits `[n, V]` of some rows."""
        return self.values[rows] if self.head is None else self.head.logits(self.values[rows])

    def logps(self, targets_N: Tensor, chunk_mib: float) -> Tensor:
        """Log-prob `[N]` in nats of a token at each row, chunk by chunk where there is a head."""
        if self.head is None:
            return gather_logps(log_softmax(self.values), targets_N)
        return chunked.token_logps(
            self.values, self.head, targets_N, chunked.chunk_rows(len(self.head.weight), chunk_mib)
        )


def output(
    labels: Tensor, name: str, values: Tensor | None, head: Head | nn.Module | None = None, *, hidden: bool = False
) -> Output | None:
    """A model's output, checked against the shape of the labels; None where there is none. Raises DpkdError."""
    if values is None:
        return None
    if labels.ndim != 2 or values.ndim != 3 or values.shape[:2] != labels.shape:
        raise DpkdError(
            f"{name}: has the shape {list(values.shape)}, and labels {list(labels.shape)}; expected [B, T, ...] and "
            "[B, T]"
        )
    if hidden and head is None:
        raise DpkdError(f"{name.removesuffix('hidden')}head: not given; {name} needs it")
    return Output(values, as_head(head) if hidden else None)


def as_head(module: Head | nn.Module | None) -> Head:
    """The output head in a causal language model of transformers, or in its last linear layer.

    A model also tells what it does to its logits (scale, soft-cap). Raises DpkdError for anything else.
    """
    if isinstance(module, Head):
        return module
    if isinstance(module, nn.Module) and hasattr(module, "get_output_embeddings"):
        return head_of(module)
    if isinstance(module, nn.Linear):
        return Head(module.weight, module.bias, LogitRule())
    raise DpkdError(
        f"head: expected a causal language model of transformers or a torch.nn.Linear, found {type(module).__name__}"
    )


def token_logps(
    labels: Tensor,
    logits: Tensor | None = None,
    *,
    hidden: Tensor | None = None,
    head: Head | nn.Module | None = None,
    chunk_mib: float = CHUNK_MIB,
) -> Tensor:
    """Log-prob `[B, T]` in nats of each labeled token, 0 elsewhere; with gradient.

    labels     `[B, T]`, -100 where a token has none; not shifted
    logits     `[B, T, V]`; or in their place
    hidden     last hidden states `[B, T, H]`, from which logits are computed chunk by chunk, with the output `head`
    chunk_mib  memory of one chunk of float32 logits

    Raises DpkdError when neither is given, or shapes do not fit.
    """
    found, where = _one(labels, logits, hidden, head), labeled_rows(labels)
    return spread(found.at(where.rows).logps(where.targets, chunk_mib), where, labels)


def pair_logps(
    labels: Tensor,
    logits: Tensor | None = None,
    *,
    hidden: Tensor | None = None,
    head: Head | nn.Module | None = None,
    chunk_mib: float = CHUNK_MIB,
) -> tuple[Pair, Pair]:
    """Summed log-probs, and lengths in tokens, of P chosen and P rejected responses: two `Pair`s of `[P]`.

    labels     `[2P, T]`: the chosen responses first, then the rejected ones in the same order
    logits     `[2P, T, V]`; or in their place `hidden`, `head` and `chunk_mib`, as in `token_logps`

    Raises DpkdError when neither is given, shapes do not fit, or the number of responses is odd.
    """
    sums, lengths, _ = logps_of_pairs(_one(labels, logits, hidden, head), labels, None, chunk_mib)
    return sums, lengths


def _one(labels: Tensor, logits: Tensor | None, hidden: Tensor | None, head: Head | nn.Module | None) -> Output:
    found = output(labels, "logits", logits) or output(labels, "hidden", hidden, head, hidden=True)
    if found is None:
        raise DpkdError("logits: not given; expected logits, or hidden and head")
    return found


def logps_of_pairs(one: Output, labels: Tensor, vocabulary: int | None, chunk_mib: float) -> tuple[Pair, Pair, Pair]:
    """Of chosen and rejected responses the sums `[P]`, lengths `[P]`, and log-probs of the tokens `[P, T]`.

    Raises DpkdError for an odd number of responses.
    """
    count, longest = labels.shape
    if count % 2:
        raise DpkdError(f"labels: {count} responses are no pairs; expected the chosen ones, then as many rejected")
    where = labeled_rows(labels)
    logps_N, sequence_N = one.at(where.rows, vocabulary).logps(where.targets, chunk_mib), where.places // longest
    lengths = torch.bincount(sequence_N, minlength=count)
    tokens = by_segment(logps_N, sequence_N, lengths, longest)
    sums, lengths = segment_sum(logps_N, sequence_N, count), lengths.to(logps_N.dtype).clamp(min=1)
    return Pair(*sums.chunk(2)), Pair(*lengths.chunk(2)), Pair(*tokens.chunk(2))


def take(values_BT: Tensor, index_N: Tensor) -> Tensor:
    """The values at flat indices of their first two dimensions."""
    return values_BT.flatten(0, 1).index_select(0, index_N)


def take_known(values: Mapping[Any, Tensor | None], index_N: Tensor) -> dict[Any, Tensor]:
    """Those values `[B, T]` that are given, at flat indices, without gradient."""
    return {key: take(value.detach(), index_N) for key, value in values.items() if value is not None}


def spread(values_N: Tensor, where: LabeledRows, labels: Tensor) -> Tensor:
    """Values of the labeled tokens at their places `[B, T]`, 0 elsewhere."""
    return values_N.new_zeros(labels.numel()).index_put((where.places,), values_N).view_as(labels)
