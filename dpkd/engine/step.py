"""One optimiser step: forward and backward over its micro-batches, then clip and update."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from dpkd.api import Pair, Signal
from dpkd.engine.culprit import explain, explain_gradient
from dpkd.engine.distiller import Distiller
from dpkd.engine.sums import Sums
from dpkd.engine.work import Cutter, Stream, Work
from dpkd.functional import segment_sum
from dpkd.models.chunked import token_logps
from dpkd.teachers.aligned import AlignedTeacher
from dpkd.teachers.live import LiveTeacher, TeacherRows
from dpkd.teachers.stored import StoredTeacher

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["Stepper"]


@dataclass
class Stepper:
    """Everything that an optimiser step needs."""

    accelerator: Accelerator
    distiller: torch.nn.Module  # the Distiller, perhaps wrapped for several processes
    optimiser: Any
    teacher: LiveTeacher | StoredTeacher | AlignedTeacher | None
    reference: LiveTeacher | None  # the student as it was at the start, where a loss reads it
    cutter: Cutter
    clip: float | None

    @property
    def inner(self) -> Distiller:
        """The Distiller itself."""
        return self.accelerator.unwrap_model(self.distiller)  # type: ignore[no-any-return]

    def __call__(self, streams: Sequence[Stream], *, lr: float, measure: bool) -> Sums:
        """Run the step and return this process's sums. Raises NotFinite, before any weight changes."""
        works = [work for stream in streams for work in self.cutter(stream, measure)]
        sums = Sums()
        self.optimiser.zero_grad(set_to_none=True)
        for number, work in enumerate(works):
            last = number == len(works) - 1
            quiet = contextlib.nullcontext() if last else self.accelerator.no_sync(self.distiller)
            with quiet:
                sums.merge(self.micro_step(work))
        self._update(lr, sums)
        return sums

    def _with_teacher(self, work: Work) -> Work:
        """The teacher's part of a micro-batch: one forward, and only where a loss or a metric reads it."""
        if self.reference is not None and work.needs_teacher(Signal.REFERENCE_LOGPS):
            logps = self.reference.logps(work.batch, self.inner.chunk)
            work = replace(work, reference_logps=self._by_response(work, logps))
        if self.teacher is None:
            return work
        if isinstance(self.teacher, AlignedTeacher):
            if work.twins is None:
                return work
            return replace(work, teacher=self.teacher.rows(work.twins, self.inner.chunk))
        # Divergences are measured against the whole distribution: a store has none.
        measured = work.measure and work.stream == "main" and isinstance(self.teacher, LiveTeacher)
        if not work.pairs:
            return self._with_rows(work, self.teacher, measured)
        if not (work.needs_teacher(Signal.TEACHER_LOGPS) or measured):
            return work
        rows = self.teacher.rows(work.batch) if measured else None
        if isinstance(rows, TeacherRows):
            with torch.no_grad():
                logps = token_logps(rows.hidden, rows.head, work.batch.targets, self.inner.chunk)
        else:
            logps = self.teacher.logps(work.batch, self.inner.chunk)
        return replace(work, teacher=rows, teacher_logps=self._by_response(work, logps))

    def _with_rows(self, work: Work, teacher: LiveTeacher | StoredTeacher, measured: bool) -> Work:
        layers = self.inner.layers_of(work).teacher
        if isinstance(teacher, LiveTeacher) and layers:
            return replace(work, teacher=teacher.rows(work.batch, layers))
        if work.needs_teacher(Signal.TEACHER_LOGITS) or measured:
            return replace(work, teacher=teacher.rows(work.batch))
        return work

    def _by_response(self, work: Work, logps_N: torch.Tensor) -> Pair:
        """Log-probs of tokens as sums over the preferred and the dispreferred responses."""
        return Pair(*segment_sum(logps_N, work.batch.sequence, len(work.batch.lengths)).chunk(2))

    def micro_step(self, work: Work) -> Sums:
        """Teacher, forward and backward of one micro-batch."""
        work = self._with_teacher(work)
        with self.accelerator.autocast():
            total, sums = self._forward(work)
        if not torch.isfinite(total):
            raise explain(self.inner, work)
        # A window in which nothing is left to learn still runs, so that processes stay in step.
        if total.requires_grad:
            self.accelerator.backward(total)
        return sums

    def _forward(self, work: Work) -> tuple[torch.Tensor, Sums]:
        return self.distiller(work)  # type: ignore[no-any-return]

    def _update(self, lr: float, sums: Sums) -> None:
        parameters = [p for p in self.distiller.parameters() if p.requires_grad]
        limit = self.clip if self.clip is not None else float("inf")
        norm = self.accelerator.clip_grad_norm_(parameters, limit)
        if norm is not None:
            norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # of sharded gradients
            if not torch.isfinite(norm):
                raise explain_gradient(self.inner)
            sums.add("gradient_norm", norm, 1.0)
        for group in self.optimiser.param_groups:
            group["lr"] = lr
        self.optimiser.step()
