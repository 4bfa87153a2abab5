"""The training loop: text, step batches, step, log, checkpoint. A reader can follow a batch from here."""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from dpkd.api import ResponseSource, StepResponses
from dpkd.config.settings import TrainSettings
from dpkd.run_folder import RunFolder
from dpkd.train import checkpoint
from dpkd.train.dev import Dev
from dpkd.train.guard import RunawayGuard
from dpkd.train.interrupt import StopRequest
from dpkd.train.mean_metrics import MeanMetrics
from dpkd.train.metrics_log import MetricsLog
from dpkd.train.optimizers import learning_rate
from dpkd.train.progress import Display
from dpkd.train.samples import SampleLog
from dpkd.train.schedules import Schedules
from dpkd.train.step_batches import StepBatchBuilder
from dpkd.train.trackers import Trackers
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


@dataclass
class Trainer:
    """The parts of a run, and its loop."""

    accelerator: Accelerator
    train_step: TrainStep
    builder: StepBatchBuilder
    schedules: Schedules
    settings: TrainSettings
    folder: RunFolder
    log: MetricsLog | None  # on the main process
    trackers: Trackers | None
    samples: SampleLog | None
    display: Display
    dev: Dev | None = None
    guard: RunawayGuard = field(default_factory=RunawayGuard)
    window: Window = field(default_factory=Window)
    ended: int | None = None  # the step at which the run ended early, of its own accord
    clock: checkpoint.SaveClock = field(init=False)
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

    def _step(self, step: int, measure: bool) -> StepResponses:
        """One optimizer step: its text, its step batches, its update. Returns the main loss's responses."""
        steps = self.steps
        values = self.schedules.apply(step, steps)
        texts = [source.next(step) for source in self.sources.values()]
        step_batches = self.builder.step_batches(step, texts)
        metrics = self.train_step(step_batches, lr=learning_rate(step, steps, self.settings), measure=measure)
        if self.schedules.follow_the_loss:
            self.schedules.follow(self._losses(metrics))
        if self.accelerator.is_main_process:  # every process knows these: they are counted once
            for name, value in values.items():
                metrics.add(f"schedule/{name}", value, 1.0)
            for group, text in zip(self.builder.groups, texts, strict=True):
                label = "text" if group.name == "main" else f"text/{group.name}"
                for name, count in text.counts.items():
                    metrics.add(f"{label}/{name}", count, 1.0)
        self.window.metrics.merge(metrics)
        self.window.tokens += sum(
            len(s.response_ids) for step_batch in step_batches for group in step_batch.groups for s in group.sequences
        )
        self._say_equal(step, texts[0])
        return texts[0]

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

    def run(self, start: int, stop: StopRequest) -> int:
        """Train from a step to the end, or to a stop request; returns the number of steps done."""
        steps = self.steps
        done = start
        if self.dev is not None and self.dev.is_hopeless:  # it ended here before it was interrupted
            self.ended = done
            return done
        if start == 0 and self.dev is not None and self._following():
            self._develop(0, self.dev)  # what later losses on held-out text are measured against
        with self.display.bar("training", steps, start):
            for step in range(start, steps):
                measure = (step + 1) % self.settings.log_every == 0 or step + 1 == steps or step == 0
                responses = self._step(step, measure)
                done = step + 1
                if measure:
                    self._log(done, learning_rate(step, steps, self.settings))
                    if self.samples is not None:
                        self.samples.record(done, responses)
                    self.window = Window()
                self.display.at(done)
                if self.dev is not None and self.dev.due(done, steps) and self._develop(done, self.dev):
                    return done
                if self._stops(stop):
                    break
                if done < steps and self._any(self.clock.due(done)):
                    self.save(done)
        return done

    def _develop(self, done: int, dev: Dev) -> bool:
        """Evaluate on the development set; whether to end the run here."""
        line = self.train_step.inner.lend(lambda student: dev.evaluate(done, student))
        shown = [name for name in ("rouge_l", "nll", "forward_kl", "reverse_kl") if name in line]
        self.display.say(f"dev {done}  " + "  ".join(f"{name} {line[name]:.3f}" for name in shown))
        if self.trackers is not None:
            self.trackers.log(done, {f"dev/{name}": value for name, value in line.items() if name != "step"})
        if dev.is_hopeless:
            self.display.say(
                f"stopped early: {dev.settings.metric} was best at step {dev.best_step}, {dev.settings.patience} "
                "evaluations ago"
            )
        for source in self._following():
            source.observe(self._agreed(line["nll"]))
        self.ended = done if dev.is_hopeless else None
        return dev.is_hopeless

    def _following(self) -> list[ResponseSource]:
        """The sources that follow the held-out loss."""
        return [source for source in self.sources.values() if source.config.follows_dev]

    def _agreed(self, value: float) -> float:
        """The main process's value, on all processes: they must decide alike."""
        if self.accelerator.num_processes == 1:
            return value
        from accelerate.utils import broadcast

        return float(broadcast(torch.tensor(value, device=self.accelerator.device)))

    def _stops(self, stop: StopRequest) -> bool:
        return self._any(stop.asked)

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
            "peak_memory_mib": _peak_memory_mib(self.accelerator.device),
        }
        if self.log is not None:
            self.log.log(step, line)
        if self.trackers is not None:
            self.trackers.log(step, line)
        self.display.at(step, line)
        if word := self.guard.look(line):
            self.display.say(f"warning, step {step}: {word}")

    def _reduced(self, metrics: MeanMetrics) -> MeanMetrics:
        """MeanMetrics and counts over all processes."""
        if self.accelerator.num_processes == 1:
            return metrics
        from accelerate.utils import gather_object

        names = sorted(set(gather_object(list(metrics.names()))))
        packed = self.accelerator.reduce(metrics.packed(names, self.accelerator.device), reduction="sum")
        return MeanMetrics.from_dict(dict(zip(names, packed.tolist(), strict=True)))

    def restore(self, restored: checkpoint.Restored) -> None:
        """Go on with the sources, and with what was measured since the last logged step."""
        for name, source in self.sources.items():
            source.restore(restored.sources[name])
        kept = restored.loop
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
        optimizer = getattr(self.train_step.optimizer, "optimizer", self.train_step.optimizer)
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
            optimizer=optimizer,
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
