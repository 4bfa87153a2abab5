"""A teacher that is a model in memory: it offers text, log-probs of given tokens, full logits and hidden states."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dpkd.api import Signal, TeacherAccess
from dpkd.cross_tokenizer.retokenize import AlignedBatch
from dpkd.data.batches import Batch
from dpkd.models.chunked import token_logps
from dpkd.models.head import Head, head_of
from dpkd.models.layers import layer_rows
from dpkd.teachers.base import Wants


@dataclass(frozen=True)
class TeacherRows:
    """The teacher's hidden states of the packed rows `[N, H]`, and its head: logits are made a chunk at a time.

    `layers` has the hidden states `[N, H]` of further layers, where a loss reads them; `targets` `[N]` has the response
    tokens, `chunk` the rows of logits that may be held at a time.
    """

    hidden: Tensor
    head: Head
    targets: Tensor
    chunk: int
    layers: Mapping[int, Tensor] = field(default_factory=dict)

    @torch.no_grad()
    def logits(self, rows: slice) -> Tensor:
        """Logits `[n, V]` of some rows, in float32, without gradient."""
        return self.head.logits(self.hidden[rows])

    @torch.no_grad()
    def raw(self, rows: slice) -> tuple[Tensor, float]:
        """Logits `[n, V]` of some rows in the type of the head's product, up to a factor, and that factor."""
        if self.head.rule.softcap is not None:
            return self.logits(rows), 1.0
        return self.head.raw(self.hidden[rows].to(self.head.weight.dtype)), self.head.rule.scale

    @torch.no_grad()
    def logps(self) -> Tensor:
        """Log-prob `[N]` in nats of each response token."""
        return token_logps(self.hidden, self.head, self.targets, self.chunk)

    def signals(self, student_logits_nV: Tensor, targets_n: Tensor, rows: slice) -> Mapping[Signal, Tensor]:
        """The teacher's logits beside the student's."""
        return {Signal.TEACHER_LOGITS: self.logits(rows).to(student_logits_nV.dtype)}

    def is_finite(self) -> bool:
        """Whether hidden states and some logits are."""
        return bool(torch.isfinite(self.hidden).all()) and bool(torch.isfinite(self.logits(slice(0, 64))).all())


class LocalTeacher:
    """A frozen causal LM in eval mode."""

    offers = TeacherAccess.HIDDEN
    measurable = True
    widest = None

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
    def score(self, batch: Batch | AlignedBatch, wants: Wants) -> TeacherRows:
        """One forward of the backbone; log-probs and logits are made from its rows when they are asked for."""
        assert isinstance(batch, Batch)
        self.forwards += 1
        home = next(self.model.parameters()).device
        hidden, states = layer_rows(self.model, batch.to(home), wants.layers)
        there = {i: state.to(self._device) for i, state in states.items()}
        return TeacherRows(hidden.to(self._device), self._head, batch.targets.to(self._device), wants.chunk, there)
