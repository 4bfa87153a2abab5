"""Losses on tokens: divergences, likelihoods, distances of hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dpkd.api import HIDDEN, Layers, Signal, TokenInputs
from dpkd.data.batches import LabeledRows, labeled_rows
from dpkd.errors import DpkdError
from dpkd.functional import reduce_loss
from dpkd.losses.base import Count, Signals, ZooLoss, about_tokens
from dpkd.losses.outputs import CHUNK_MIB, output, take
from dpkd.models.head import Head
from dpkd.models.layers import stack_of


class DistillationLoss(ZooLoss):
    """A loss on tokens: logits of student and teacher, or their hidden states, at the labeled tokens."""

    layers: Layers | None = None

    def forward(
        self,
        *,
        labels: Tensor,
        student_logits: Tensor | None = None,
        teacher_logits: Tensor | None = None,
        student_hidden: Sequence[Tensor] | None = None,
        teacher_hidden: Sequence[Tensor] | None = None,
        by_student: Tensor | None = None,
        num_items_in_batch: Count | None = None,
    ) -> Tensor:
        """The loss, a scalar in nats per labeled token.

        labels              `[B, T]`, -100 where a token is not trained; not shifted
        student_logits      `[B, T, V]`
        teacher_logits      `[B, T, V]`; no gradient goes there
        student_hidden      for a loss on hidden states: those `[B, T, H]` of all layers, which a model of transformers
                            returns with `output_hidden_states=True`; `teacher_hidden` likewise
        by_student          `[B]`, bool: whether the student wrote the response (`distillm2`)
        num_items_in_batch  labeled tokens of the whole optimizer step; None: of these labels

        Raises DpkdError when what the loss reads is missing, or shapes do not fit.
        """
        where = labeled_rows(labels)
        others = about_tokens(where, labels, by_student)
        if HIDDEN & self.reads:
            others |= self._states(where, student_hidden, teacher_hidden)
            values_N = self._values(TokenInputs, others, labels.device)
            return reduce_loss(values_N, len(where.rows) if num_items_in_batch is None else num_items_in_batch)
        student = output(labels, "student_logits", student_logits)
        teacher = output(labels, "teacher_logits", teacher_logits)
        return self._reduced(TokenInputs, where, student, teacher, others, num_items_in_batch, CHUNK_MIB)

    def from_hidden(
        self,
        student_hidden: Tensor,
        student_head: Head | nn.Module,
        teacher_hidden: Tensor | None = None,
        teacher_head: Head | nn.Module | None = None,
        labels: Tensor | None = None,
        *,
        by_student: Tensor | None = None,
        num_items_in_batch: Count | None = None,
        chunk_mib: float = CHUNK_MIB,
    ) -> Tensor:
        """The same loss without logits `[B, T, V]`: the output heads run on a few tokens at a time.

        student_hidden  last hidden states `[B, T, H]`, ready for the head, with gradient
        student_head    the causal language model, or its output layer (`torch.nn.Linear`)
        teacher_hidden  `[B, T, H']` of the teacher's own width, with `teacher_head`
        labels          `[B, T]`; `labels`, `by_student` and `num_items_in_batch` as in a call with logits
        chunk_mib       memory of one chunk of float32 logits

        The gradient is taken chunk by chunk, inside this call: call `backward` on the result once at most.
        """
        labels = required(labels)
        where = labeled_rows(labels)
        student = output(labels, "student_hidden", student_hidden, student_head, hidden=True)
        teacher = output(labels, "teacher_hidden", teacher_hidden, teacher_head, hidden=True)
        others = about_tokens(where, labels, by_student)
        return self._reduced(TokenInputs, where, student, teacher, others, num_items_in_batch, chunk_mib)

    def bind(self, student: Any, teacher: Any) -> DistillationLoss:
        """Tell a loss on hidden states what the models are like, before the optimizer is made: it makes its weights.

        `student` and `teacher` are models of transformers or their configurations. Raises DpkdError when they do not
        fit the settings.
        """
        stacks = [stack_of(getattr(model, "config", model)) for model in (student, teacher)]
        try:
            self.layers = self.loss.bind(*stacks)
        except (ValueError, NotImplementedError) as error:
            raise DpkdError(f"the loss {self.spec.name} does not fit the models: {error}") from error
        return self

    def _states(
        self, where: LabeledRows, student: Sequence[Tensor] | None, teacher: Sequence[Tensor] | None
    ) -> Signals:
        """The hidden states `[N, K, H]` of the layers that the loss reads."""
        if self.layers is None:
            raise DpkdError(
                f"the loss {self.spec.name} reads hidden states: call loss.bind(student, teacher) before the optimizer "
                "is made"
            )
        found: Signals = {}
        if student is not None:
            states = [take(student[i], where.rows) for i in self.layers.student]
            found[Signal.STUDENT_HIDDEN] = torch.stack(states, 1)
        if teacher is not None:
            states = [take(teacher[i].detach(), where.rows) for i in self.layers.teacher]
            found[Signal.TEACHER_HIDDEN] = torch.stack(states, 1)
        return found


def required(labels: Tensor | None) -> Tensor:
    """The labels. Raises DpkdError when there are none: arguments before them have defaults."""
    if labels is None:
        raise DpkdError("labels: not given; expected the input ids [B, T], with -100 where a token is not trained")
    return labels
