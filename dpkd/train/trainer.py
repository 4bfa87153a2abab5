"""The training loop: text, step batches, step, log, checkpoint. A reader can follow a batch from here."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dpkd.api import Callback, ResponseSource, StepResponses, Teacher, TeacherLost, Text
from dpkd.config.settings import TrainSettings
from dpkd.run_folder import RunFolder
from dpkd.train import checkpoint
from dpkd.train.interrupt import StopRequest
from dpkd.train.mean_metrics import MeanMetrics
from dpkd.train.microbatch import StepBatch
from dpkd.train.optimizers import learning_rate
from dpkd.train.progress import Display
from dpkd.train.schedules import Schedules
from dpkd.train.step_batches import StepBatchBuilder
from dpkd.train.timings import Timings, clock_of
from dpkd.train.train_step import TrainStep

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass
class Window:
    """What was measured since the last logged step."""

    metrics: MeanMetrics = field(default_factory=MeanMetrics)
    tokens: int = 0
    seconds: float = 0.0
    began: float = field(default_factory=time.monotonic)

    def elapsed(self) -> float:
        """Seconds, those before an interruption included."""
        return self.seconds + time.monotonic() - self.began


@dataclass(kw_only=True)
class Trainer:
    """The loop of a run, and all that it goes through. `callbacks` see it at fixed points, in their order."""

    accelerator: Accelerator
    train_step: TrainStep
    builder: StepBatchBuilder
    schedules: Schedules
    settings: TrainSettings
    folder: RunFolder
    display: Display
    callbacks: Sequence[Callback] = ()
    window: Window = field(default_factory=Window)
    responses: StepResponses | None = None
    ended: int | None = None  # the step at which the run ended early, of its own accord
    clock: checkpoint.SaveClock = field(init=False)
    _done: int = 0
    _said_equal: bool = False

    def __post_init__(self) -> None:
        self.clock = checkpoint.SaveClock(self.settings.save_every)

    @property
    def sources(self) -> dict[str, ResponseSource]:
        """Where the responses come from, by group of losses; the first is the main loss's."""
        return {group.name: group.source for group in self.builder.groups}

    @property
    def steps(self) -> int:
        """Optimizer steps of the run."""
        return self.builder.groups[0].source.context.batches.steps

    @property
    def timings(self) -> Timings:
        """Where the time goes."""
        return self.train_step.timings

    @property
    def path(self) -> Path:
        """The run folder."""
        return self.folder.path

    def run(self, start: int, stop: StopRequest) -> int:
        """Train from a step to the end, or to a stop request; returns the number of steps done."""
        self._done = start
        with self.timings("callbacks"):
            for callback in self.callbacks:
                callback.on_start(self, start)
        with self.display.bar("training", self.steps, start):
            for step in range(start, self.steps):
                if self.ended is not None:
                    break
                measure = (step + 1) % self.settings.log_every == 0 or step + 1 == self.steps or step == 0
                with self.timings("first step") if step == start else nullcontext():
                    self._stoppable_step(step, measure)
                self._done = step + 1
                if measure:
                    with self.timings("log"):
                        self._log(self._done, learning_rate(step, self.steps, self.settings))
                self.display.at(self._done)
                with self.timings("callbacks"):
                    for callback in self.callbacks:
                        callback.on_step(self, self._done)
                if step == start:
                    self.timings.begin_steps(clock_of(self.accelerator.device))
                if self._any(stop.asked):
                    break
                if self.ended is None and self._done < self.steps and self._any(self.clock.due(self._done)):
                    with self.timings("checkpoint"):
                        self.save(self._done)
        return self._done

    def _step(self, step: int, measure: bool) -> None:
        """One optimizer step: responses, step batches, update."""
        values = self.schedules.apply(step, self.steps)
        with self.timings("draw"):
            texts = [source.next(step) for source in self.sources.values()]
        with self.timings("data"):
            step_batches = self.builder.step_batches(step, texts)
        lr = learning_rate(step, self.steps, self.settings)
        metrics = self.train_step(step_batches, lr=lr, measure=measure, ahead=self._ahead(step + 1))
        if self.schedules.follow_the_loss:
            self.schedules.follow(self._losses(metrics))
        if self.accelerator.is_main_process:  # every process knows these: they are counted once
            self._count(metrics, values, texts)
        self.window.metrics.merge(metrics)
        self.window.tokens += sum(step_batch.tokens for step_batch in step_batches)
        self.responses = texts[0]
        self._say_equal(step, texts[0])

    def _count(self, metrics: MeanMetrics, schedules: Mapping[str, float], texts: Sequence[StepResponses]) -> None:
        """Add the values of the schedules, and what the sources counted."""
        for name, value in schedules.items():
            metrics.add(f"schedule/{name}", value, 1.0)
        for group, text in zip(self.builder.groups, texts, strict=True):
            label = "text" if group.name == "main" else f"text/{group.name}"
            for name, count in text.counts.items():
                metrics.add(f"{label}/{name}", count, 1.0)

    def say(self, text: str) -> None:
        """Print a line, on the main process."""
        self.display.say(text)

    def stop(self, reason: str) -> None:
        """End the run after this step, as finished."""
        self.ended = self._done
        self.display.say(reason)

    def lend(self, work: Callable[[nn.Module], Any]) -> Any:
        """Give the student, with whole weights, to some work; all processes call it together."""
        return self.train_step.lend_saved(work)

    def evaluated(self, step: int, line: Mapping[str, float]) -> None:
        """Tell all callbacks, and the sources that follow it, of an evaluation on held-out rows."""
        for callback in self.callbacks:
            callback.on_evaluate(self, step, line)
        for source in self.sources.values():
            if source.config.follows_dev:
                source.observe(self._agreed(line["nll"]))

    def close(self) -> None:
        """End what the callbacks have open, however the loop ended."""
        for callback in self.callbacks:
            callback.on_end(self)

    def _ahead(self, step: int) -> list[StepBatch]:
        """The text of a later step that is fixed, where the teacher can be asked for it already."""
        if self._remote is None or step >= self.steps or self.accelerator.num_processes > 1:
            return []
        return [
            group.step_batch(
                StepResponses(group.source.fixed(group.source.context.batches.window(step)), {}), self.builder.prompts
            )
            for group in self.builder.groups
            if Text.STUDENT not in group.source.config.writers
        ]

    @property
    def _remote(self) -> Teacher | None:
        """The teacher, where it may be lost."""
        teacher = self.train_step.teacher
        return teacher if teacher is not None and teacher.remote else None

    def _stoppable_step(self, step: int, measure: bool) -> None:
        """A step; where it loses the teacher, the run is as it was before it, and a checkpoint is written."""
        if self._remote is None or self.accelerator.num_processes > 1:
            self._step(step, measure)
            return
        random_state = checkpoint.random_state(self.accelerator.device)
        states = {name: source.state() for name, source in self.sources.items()}
        try:
            self._step(step, measure)
        except TeacherLost:
            checkpoint.set_random_state(random_state, self.accelerator.device)
            for name, source in self.sources.items():
                source.restore(states[name])
            if step > 0:
                self.save(step)
            raise

    def _losses(self, metrics: MeanMetrics) -> dict[str, float]:
        """The mean loss of each term of a step, over all processes."""
        averages = self._reduced(metrics).averages()
        return {name.removeprefix("loss/"): value for name, value in averages.items() if name.startswith("loss/")}

    def _say_equal(self, step: int, text: StepResponses) -> None:
        if text.responses or self._said_equal or not text.counts["equal_pairs"]:
            return
        self._said_equal = True
        self.display.say(
            f"step {step + 1}: the two responses of every pair are equal, so the step teaches nothing "
            "(text/equal_pairs counts them; this is said once)"
        )

    def _agreed(self, value: float) -> float:
        """The main process's value, on all processes: they must decide alike."""
        if self.accelerator.num_processes == 1:
            return value
        from accelerate.utils import broadcast

        return float(broadcast(torch.tensor(value, device=self.accelerator.device)))

    def _any(self, here: bool) -> bool:
        """Whether something is so in any process: all stop, and save, at the same step."""
        if self.accelerator.num_processes == 1:
            return here
        asked = torch.tensor(float(here), device=self.accelerator.device)
        return bool(self.accelerator.reduce(asked, reduction="sum") > 0)

    def _log(self, step: int, lr: float) -> None:
        seconds = self.window.elapsed()
        facts = {"lr": lr, "tokens_per_second": self.window.tokens / seconds, "seconds": seconds}
        metrics = self._reduced(self.window.metrics).averages()
        weights = self.builder.weights
        weighted = {f"weighted/{n}": metrics[f"loss/{n}"] * w for n, w in weights.items() if f"loss/{n}" in metrics}
        responses = metrics.get("text/responses", 0.0)
        share = metrics.get("text/truncated_responses", 0.0) / responses if responses else 0.0
        line: dict[str, Any] = {
            **metrics,
            **weighted,
            "loss/total": sum(weighted.values()),
            "text/truncated_share": share,
            **facts,
            **({} if self.train_step.teacher is None else self.train_step.teacher.statistics()),
            "peak_memory_mib": _peak_memory_mib(self.accelerator.device),
        }
        self.display.at(step, line)
        for callback in self.callbacks:
            callback.on_log(self, step, line)
        self.window = Window()

    def _reduced(self, metrics: MeanMetrics) -> MeanMetrics:
        if self.accelerator.num_processes == 1:
            return metrics
        from accelerate.utils import gather_object

        names = sorted(set(gather_object(list(metrics.names()))))
        packed = self.accelerator.reduce(metrics.packed(names, self.accelerator.device), reduction="sum")
        return MeanMetrics.from_dict(dict(zip(names, packed.tolist(), strict=True)))

    def restore(self, sources: Mapping[str, Mapping[str, Any]], kept: Mapping[str, Any]) -> None:
        """Go on with what `checkpoint.load` returned: the sources, and what was measured since the last logged step."""
        for name, source in self.sources.items():
            source.restore(sources[name])
        self.schedules.restore(kept["schedules"])
        # What all processes measured is counted once, by the main one.
        metrics = MeanMetrics.from_dict(kept["metrics"]) if self.accelerator.is_main_process else MeanMetrics()
        self.window = Window(metrics, kept["tokens"], kept["seconds"])

    def save(self, step: int) -> None:
        """Write a checkpoint and delete those no longer kept. Raises NotFinite after a bad step, and writes none."""
        self.train_step.check()
        state = checkpoint.random_state(self.accelerator.device)
        states = [state]
        if self.accelerator.num_processes > 1:
            from accelerate.utils import gather_object

            states = gather_object([state])
        loop = {
            "metrics": self._reduced(self.window.metrics).as_dict(),
            "tokens": self.window.tokens,
            "seconds": self.window.elapsed(),
            "schedules": self.schedules.state(),
        }
        checkpoint.save(
            self.folder.checkpoints,
            step,
            module=self.train_step.inner,
            optimizer=self.train_step.torch_optimizer,
            zero=self.train_step.zero,
            sources={name: source.state() for name, source in self.sources.items()},
            loop=loop,
            random_states=states,
            is_main=self.accelerator.is_main_process,
        )
        if self.accelerator.is_main_process:
            checkpoint.prune(self.folder.checkpoints, self.settings.keep_checkpoints)
        self.clock.saved()
        self.accelerator.wait_for_everyone()


def _peak_memory_mib(device: torch.device) -> float:
    """Peak of the GPU's allocator, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
