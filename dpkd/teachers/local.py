"""A teacher that is a model in memory: it offers text, log-probs of given tokens, full logits and hidden states."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dpkd.api import TeacherAccess
from dpkd.data.batches import Batch
from dpkd.models.chunked import token_logps
from dpkd.models.head import Head, head_of
from dpkd.models.layers import layer_rows


@dataclass(frozen=True)
class TeacherRows:
    """The teacher's hidden states of the packed rows `[N, H]`, and its head: logits are made a chunk at a time.

    `layers` has the hidden states `[N, H]` of further layers, where a loss reads them.
    """

    hidden: Tensor
    head: Head
    layers: Mapping[int, Tensor] = field(default_factory=dict)

    @torch.no_grad()
    def logits(self, rows: slice) -> Tensor:
        """Logits `[n, V]` of some rows, in float32, without gradient."""
        return self.head.logits(self.hidden[rows])


class LocalTeacher:
    """A frozen causal LM in eval mode."""

    offers = TeacherAccess.HIDDEN

    def __init__(self, model: torch.nn.Module, vocabulary: int, device: torch.device) -> None:
        """`device` is the student's, where the losses are computed."""
        self.model = model.eval().requires_grad_(False)
        self._device = device
        self.forwards = 0
        head = head_of(model, vocabulary)
        self._head = Head(
            head.weight.detach().to(device), None if head.bias is None else head.bias.detach().to(device), head.rule
        )

    @torch.no_grad()
    def rows(self, batch: Batch, layers: Collection[int] = ()) -> TeacherRows:
        """Hidden states of the response positions, also of some layers: one forward of the backbone."""
        self.forwards += 1
        home = next(self.model.parameters()).device
        hidden, states = layer_rows(self.model, batch.to(home), layers)
        return TeacherRows(
            hidden.to(self._device), self._head, {i: state.to(self._device) for i, state in states.items()}
        )

    @torch.no_grad()
    def logps(self, batch: Batch, chunk: int) -> Tensor:
        """Log-prob `[N]` in nats of each response token."""
        rows = self.rows(batch)
        return token_logps(rows.hidden, rows.head, batch.targets, chunk)
