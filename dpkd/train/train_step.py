"""One optimizer step: forward and backward over its micro-batches, then clip and update."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from dpkd.api import Signal
from dpkd.api.inputs import REFERENCE_LOGPS, TEACHER_LOGPS
from dpkd.api.teachers import Teacher, Wants
from dpkd.train.ema import averaged
from dpkd.train.loss_module import LossModule
from dpkd.train.mean_metrics import MeanMetrics
from dpkd.train.microbatch import MicroBatch, MicroBatcher, StepBatch
from dpkd.train.nonfinite import FiniteWatch, NotFinite, explain, explain_gradient
from dpkd.train.timings import Timings
from dpkd.train.zero import Zero

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(kw_only=True)
class TrainStep:
    """Everything that an optimizer step needs.

    loss_module       the LossModule, perhaps wrapped for several processes
    reference         the student as it was at the start, where a loss reads it
    clip              largest norm of the gradient
    zero              the engine that runs the loss_module and updates its weights, where DeepSpeed does
    autocast_teacher  whether the teacher computes in the precision of the run, though its weights are kept in another
    timings           where the time of the run goes
    """

    accelerator: Accelerator
    loss_module: torch.nn.Module
    optimizer: Any
    teacher: Teacher | None
    reference: Teacher | None
    micro_batcher: MicroBatcher
    clip: float | None
    zero: Zero | None = None
    autocast_teacher: bool = False
    timings: Timings = field(default_factory=Timings)

    @property
    def inner(self) -> LossModule:
        """The LossModule itself."""
        module: Any = self.loss_module
        return getattr(module, "module", module)  # type: ignore[no-any-return]

    @property
    def torch_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer itself."""
        return getattr(self.optimizer, "optimizer", self.optimizer)  # type: ignore[no-any-return]

    def __call__(
        self, step_batches: Sequence[StepBatch], *, lr: float, measure: bool, ahead: Sequence[StepBatch] = ()
    ) -> MeanMetrics:
        """Run the step and return this process's metrics. Raises NotFinite, before any weight changes.

        `ahead` has what is known of the next step: a teacher from outside this process is asked for it already.
        """
        with self.timings("data"):
            micro_batches = [m for step_batch in step_batches for m in self.micro_batcher(step_batch, measure)]
        self._expect(step_batches if self.accelerator.num_processes == 1 else ())
        self._expect(ahead)
        metrics = MeanMetrics()
        self.optimizer.zero_grad(set_to_none=True)
        for number, micro_batch in enumerate(micro_batches, 1):
            with self._synchronized(last=number == len(micro_batches)):
                metrics.merge(self.micro_step(micro_batch))
        with self.timings("update"):
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            if self.zero is None:
                self._clip(metrics)
                if self.watch.end_of_step(step_batches, self._added_up):
                    self.check()
                self.optimizer.step()
            else:
                self._see_norm(self.zero.step(), metrics)
        if measure:
            self.check()
        return metrics

    def lend_saved(self, work: Callable[[torch.nn.Module], Any]) -> Any:
        """Give the student to some work, with the weights that are saved: their average where one is kept."""
        with averaged(self.torch_optimizer):
            return self.inner.lend(work)

    @cached_property
    def watch(self) -> FiniteWatch:
        """What keeps a step that is not finite from the weights."""
        watch = FiniteWatch(self.torch_optimizer, self.accelerator.device)
        watch.at_once |= self.zero is not None  # DeepSpeed's engine waits in every step
        return watch

    def check(self) -> None:
        """Wait for the steps so far. Raises NotFinite where one of them was not finite; no weight has changed since."""
        if (step_batches := self.watch.first_bad_step()) is None:
            return
        self.watch.at_once = True  # the step again, to see who was the first to be wrong
        self.optimizer.zero_grad(set_to_none=True)
        for micro_batch in (m for step_batch in step_batches for m in self.micro_batcher(step_batch, False)):
            self.micro_step(micro_batch)
        self._clip(MeanMetrics())
        raise NotFinite("a loss or its gradient was not finite in one of the last steps, and is when it is done again.")

    def _added_up(self, flag: torch.Tensor) -> torch.Tensor:
        """Over the processes, which must skip the same steps."""
        if self.accelerator.num_processes == 1:
            return flag
        return self.accelerator.reduce(flag, reduction="sum")  # type: ignore[no-any-return]

    def micro_step(self, micro_batch: MicroBatch) -> MeanMetrics:
        """Teacher, forward and backward of one micro-batch."""
        with self.timings("teacher"):
            micro_batch = self.with_teacher(micro_batch)
        with self.timings("forward/backward"):
            with self.accelerator.autocast():
                total, metrics = self.loss_module(micro_batch)
            if self.watch.see(total.detach()):
                raise explain(self.inner, micro_batch)
            # A window in which nothing is left to learn still runs, so that processes stay in step.
            if total.requires_grad:
                (self.accelerator if self.zero is None else self.zero).backward(total)
        return metrics  # type: ignore[no-any-return]

    def with_teacher(self, micro_batch: MicroBatch) -> MicroBatch:
        """What the teacher, and the reference, say of a micro-batch: one forward, and only where it is read."""
        chunk = self.inner.chunk
        if self.reference is not None and micro_batch.reads(*REFERENCE_LOGPS):
            with self.accelerator.autocast():  # as the student of now
                logps = self.reference.score(micro_batch.batch, Wants(chunk, logps=True)).logps()
            micro_batch = replace(micro_batch, reference_logps=logps)
        if self.teacher is None:
            return micro_batch
        layers = self.inner.layers_of(micro_batch).teacher
        wants = micro_batch.wants(layers, chunk, measurable=self.teacher.measurable)
        if not wants.anything:
            return micro_batch
        if self._chooses(micro_batch):
            with torch.no_grad(), self.accelerator.autocast():
                chosen = self.loss_module(micro_batch, choose=True)
            wants = wants._replace(chosen=chosen)
            micro_batch = replace(micro_batch, extra={**micro_batch.extra, Signal.CHOSEN_IDS: chosen})
        as_student = self.teacher.of_student or self.autocast_teacher
        with self.accelerator.autocast() if as_student else contextlib.nullcontext():
            output = self.teacher.score(micro_batch.aligned or micro_batch.batch, wants)
        measurable = micro_batch.measured and self.teacher.measurable
        return replace(
            micro_batch,
            teacher=output if measurable or not micro_batch.pairs else None,
            measurable=measurable,
            teacher_logps=output.logps() if wants.logps else None,
        )

    def _expect(self, step_batches: Sequence[StepBatch]) -> None:
        """Tell a teacher from outside this process what it will be asked: it begins with all of it."""
        if self.teacher is None or not self.teacher.remote:
            return
        for step_batch in step_batches:
            reads = frozenset().union(*(term.reads for term in step_batch.terms))
            logits = not step_batch.pairs and Signal.TEACHER_LOGITS in reads
            wants = Wants(1, logps=step_batch.pairs and bool(TEACHER_LOGPS & reads), logits=logits)
            if wants.anything and not (self.teacher.chooses and Signal.CHOSEN_IDS in reads):
                self.teacher.expect([s for group in step_batch.groups for s in group.sequences], wants)

    def _chooses(self, micro_batch: MicroBatch) -> bool:
        """Whether the teacher must be told which ids the student finds likeliest."""
        return self.teacher is not None and self.teacher.chooses and micro_batch.reads(Signal.CHOSEN_IDS)

    def _synchronized(self, *, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Processes exchange gradients in the last backward pass of a step only."""
        if last or self.zero is not None:
            return contextlib.nullcontext()
        return self.accelerator.no_sync(self.loss_module)  # type: ignore[no-any-return]

    def _clip(self, metrics: MeanMetrics) -> None:
        """Clip the gradient. Raises NotFinite where its norm is not."""
        parameters = [p for p in self.loss_module.parameters() if p.requires_grad]
        norm = self.accelerator.clip_grad_norm_(parameters, float("inf") if self.clip is None else self.clip)
        if norm is None:
            return
        self._see_norm(norm.full_tensor() if hasattr(norm, "full_tensor") else norm, metrics)  # of sharded gradients

    def _see_norm(self, norm: torch.Tensor, metrics: MeanMetrics) -> None:
        """Take note of the norm of the gradient. Raises NotFinite where it is known not to be."""
        if self.watch.see(norm):
            raise explain_gradient(self.inner)
        metrics.add("gradient_norm", norm, 1.0)
