"""One optimizer step: forward and backward over its micro-batches, then clip and update."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from dpkd.api import Pair, Signal
from dpkd.functional import segment_sum
from dpkd.models.chunked import token_logps
from dpkd.teachers.aligned import AlignedTeacher
from dpkd.teachers.local import LocalTeacher, TeacherRows
from dpkd.teachers.store import StoreTeacher
from dpkd.train.loss_module import LossModule
from dpkd.train.mean_metrics import MeanMetrics
from dpkd.train.microbatch import MicroBatch, MicroBatcher, StepBatch
from dpkd.train.nonfinite import explain, explain_gradient

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass
class TrainStep:
    """Everything that an optimizer step needs."""

    accelerator: Accelerator
    loss_module: torch.nn.Module  # the LossModule, perhaps wrapped for several processes
    optimizer: Any
    teacher: LocalTeacher | StoreTeacher | AlignedTeacher | None
    reference: LocalTeacher | None  # the student as it was at the start, where a loss reads it
    micro_batcher: MicroBatcher
    clip: float | None

    @property
    def inner(self) -> LossModule:
        """The LossModule itself."""
        return self.accelerator.unwrap_model(self.loss_module)  # type: ignore[no-any-return]

    def __call__(self, step_batches: Sequence[StepBatch], *, lr: float, measure: bool) -> MeanMetrics:
        """Run the step and return this process's metrics. Raises NotFinite, before any weight changes."""
        micro_batches = [
            micro_batch for step_batch in step_batches for micro_batch in self.micro_batcher(step_batch, measure)
        ]
        metrics = MeanMetrics()
        self.optimizer.zero_grad(set_to_none=True)
        for number, micro_batch in enumerate(micro_batches):
            last = number == len(micro_batches) - 1
            quiet = contextlib.nullcontext() if last else self.accelerator.no_sync(self.loss_module)
            with quiet:
                metrics.merge(self.micro_step(micro_batch))
        self._update(lr, metrics)
        return metrics

    def _with_teacher(self, micro_batch: MicroBatch) -> MicroBatch:
        """The teacher's part of a micro-batch: one forward, and only where a loss or a metric reads it."""
        if self.reference is not None and micro_batch.needs_teacher(Signal.REFERENCE_LOGPS):
            logps = self.reference.logps(micro_batch.batch, self.inner.chunk)
            micro_batch = replace(micro_batch, reference_logps=self._by_response(micro_batch, logps))
        if self.teacher is None:
            return micro_batch
        if isinstance(self.teacher, AlignedTeacher):
            if micro_batch.aligned is None:
                return micro_batch
            return replace(micro_batch, teacher=self.teacher.rows(micro_batch.aligned, self.inner.chunk))
        # Divergences are measured against the whole distribution: a store has none.
        measured = micro_batch.measure and micro_batch.step_batch == "main" and isinstance(self.teacher, LocalTeacher)
        if not micro_batch.pairs:
            return self._with_rows(micro_batch, self.teacher, measured)
        if not (micro_batch.needs_teacher(Signal.TEACHER_LOGPS) or measured):
            return micro_batch
        rows = self.teacher.rows(micro_batch.batch) if measured else None
        if isinstance(rows, TeacherRows):
            with torch.no_grad():
                logps = token_logps(rows.hidden, rows.head, micro_batch.batch.targets, self.inner.chunk)
        else:
            logps = self.teacher.logps(micro_batch.batch, self.inner.chunk)
        return replace(micro_batch, teacher=rows, teacher_logps=self._by_response(micro_batch, logps))

    def _with_rows(self, micro_batch: MicroBatch, teacher: LocalTeacher | StoreTeacher, measured: bool) -> MicroBatch:
        layers = self.inner.layers_of(micro_batch).teacher
        if isinstance(teacher, LocalTeacher) and layers:
            return replace(micro_batch, teacher=teacher.rows(micro_batch.batch, layers))
        if micro_batch.needs_teacher(Signal.TEACHER_LOGITS) or measured:
            return replace(micro_batch, teacher=teacher.rows(micro_batch.batch))
        return micro_batch

    def _by_response(self, micro_batch: MicroBatch, logps_N: torch.Tensor) -> Pair:
        """Log-probs of tokens as metrics over the chosen and the rejected responses."""
        return Pair(*segment_sum(logps_N, micro_batch.batch.sequence, len(micro_batch.batch.lengths)).chunk(2))

    def micro_step(self, micro_batch: MicroBatch) -> MeanMetrics:
        """Teacher, forward and backward of one micro-batch."""
        micro_batch = self._with_teacher(micro_batch)
        with self.accelerator.autocast():
            total, metrics = self._forward(micro_batch)
        if not torch.isfinite(total):
            raise explain(self.inner, micro_batch)
        # A window in which nothing is left to learn still runs, so that processes stay in step.
        if total.requires_grad:
            self.accelerator.backward(total)
        return metrics

    def _forward(self, micro_batch: MicroBatch) -> tuple[torch.Tensor, MeanMetrics]:
        return self.loss_module(micro_batch)  # type: ignore[no-any-return]

    def _update(self, lr: float, metrics: MeanMetrics) -> None:
        parameters = [p for p in self.loss_module.parameters() if p.requires_grad]
        limit = self.clip if self.clip is not None else float("inf")
        norm = self.accelerator.clip_grad_norm_(parameters, limit)
        if norm is not None:
            norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # of sharded gradients
            if not torch.isfinite(norm):
                raise explain_gradient(self.inner)
            metrics.add("gradient_norm", norm, 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
