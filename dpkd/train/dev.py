"""Evaluation while training: a few held-out rows, the best model kept, and a stop when it stays worse."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from dpkd.api import Callback, MetricSpec, SamplingSettings, Training
from dpkd.api.teachers import Teacher
from dpkd.config.settings import DevSettings
from dpkd.errors import DpkdError
from dpkd.evaluation.evaluator import EvaluationSettings, evaluate_model
from dpkd.evaluation.inputs import Inputs
from dpkd.io import JsonLog, remove_folder
from dpkd.models.saving import save_model
from dpkd.run_folder import RunFolder
from dpkd.run_metrics import read_metrics
from dpkd.train import checkpoint


def direction_of(metric: str, specs: Mapping[str, MetricSpec]) -> int:
    """1 where higher is better, -1 where lower is. Raises DpkdError for a metric that is neither, or not there."""
    if metric not in specs:
        raise DpkdError(f"dev.metric: no metric is called {metric!r}; there are: {', '.join(specs)}")
    if not specs[metric].better:
        raise DpkdError(f"dev.metric: {metric} is neither better high nor low; choose another, such as rouge_l")
    return 1 if specs[metric].better == "higher" else -1


@dataclass
class Dev(Callback):
    """The development set of a run; `dev.jsonl` has a line for each evaluation."""

    settings: DevSettings
    inputs: Inputs
    tokenizer: Any
    teacher: Teacher | None
    vocabulary: int
    seed: int
    folder: RunFolder
    is_main: bool
    specs: dict[str, MetricSpec]
    first: bool = False  # evaluate before the first step too: a source follows these losses
    lines: list[dict[str, float]] = field(default_factory=list)

    @property
    def file(self) -> Path:
        return self.folder.path / "dev.jsonl"

    @cached_property
    def _log(self) -> JsonLog:
        return JsonLog(self.file, step=int)

    def saved(self, step: int) -> Path:
        """The folder of the best model so far, by its step: `model`, and `adapter` where it has one."""
        return self.folder.best / f"step-{step:08d}"

    def restore(self, step: int) -> None:
        """Forget what an interrupted run did after a step; all of it before the first checkpoint.

        Raises DpkdError when dev.jsonl is damaged, or the model that it names as the best so far is lost.
        """
        if not self.file.exists():
            return
        self.lines = [row for row in read_metrics(self.file) if row["step"] <= step and step > 0]
        if self.is_main:
            self._log.keep(lambda row: row["step"] <= step and step > 0)
        best = self.best_step
        if best is not None and not self.saved(best).is_dir():
            raise DpkdError(
                f"{self.file} names step {best} as the best so far, but its model, {self.saved(best)}, is lost. "
                f"Delete {self.file.name} to go on without the evaluations so far."
            )

    def on_start(self, training: Training, step: int) -> None:
        self.restore(step)
        if self.is_hopeless:  # it ended here before it was interrupted
            training.stop(self._why())
        elif step == 0 and self.first:
            self._evaluate(training, 0)

    def on_step(self, training: Training, step: int) -> None:
        if self.due(step, training.steps):
            self._evaluate(training, step)
            if self.is_hopeless:
                training.stop(self._why())

    def _evaluate(self, training: Training, step: int) -> None:
        line = training.lend(lambda student: self.evaluate(step, student))
        shown = [name for name in ("rouge_l", "nll", "forward_kl", "reverse_kl") if name in line]
        training.say(f"dev {step}  " + "  ".join(f"{name} {line[name]:.3f}" for name in shown))
        training.evaluated(step, line)

    def _why(self) -> str:
        best = f"{self.settings.metric} was best at step {self.best_step}"
        return f"stopped early: {best}, {self.settings.patience} evaluations ago"

    def due(self, step: int, steps: int) -> bool:
        """After every so many steps, and at the end."""
        return step % self.settings.every == 0 or step == steps

    def evaluate(self, step: int, student: Any) -> Mapping[str, float]:
        """Score the student, note it, and keep it if it is the best so far."""
        began = time.monotonic()
        sampling = SamplingSettings(
            temperature=self.settings.temperature,
            max_new_tokens=self.settings.max_new_tokens,
            batch_size=self.settings.batch_size,
        )
        result, _, _ = evaluate_model(
            student,
            self.inputs,
            self.tokenizer,
            teacher=self.teacher,
            vocabulary=self.vocabulary,
            settings=EvaluationSettings(sampling, (self.seed,), cuts=()),
            specs=self.specs,
        )
        line = {"step": step, **{name: metric.mean for name, metric in result.metrics.items()}}
        if self.settings.metric not in line:
            raise DpkdError(f"dev.metric: {self.settings.metric} needs a teacher's model, and this run has none")
        before = self.best_step
        self.lines.append(line)
        if self.is_main:
            if self.best_step != before:  # the model first: a line without its model could not be resumed
                save_model(student, self.tokenizer, self.saved(step) / "model")
            self._log.append({**line, "seconds": time.monotonic() - began})
            self._prune()
        return line

    def _prune(self) -> None:
        """Keep the best model so far, and what was the best at each checkpoint that a run may go on from."""
        wanted = {self.best_step, *(self._best_at(step) for step in checkpoint.steps(self.folder.checkpoints))}
        for folder in self.folder.best.glob("step-*"):
            if folder not in [self.saved(step) for step in wanted if step is not None]:
                remove_folder(folder)

    @cached_property
    def _sign(self) -> int:
        return direction_of(self.settings.metric, self.specs)

    def _best_at(self, step: int) -> int | None:
        """The step of the best evaluation up to a step; None where none had a finite value."""
        values = {int(line["step"]): self._sign * line[self.settings.metric] for line in self.lines}
        known = {at: value for at, value in values.items() if at <= step and math.isfinite(value)}
        return max(known, key=lambda at: (known[at], -at), default=None)

    @property
    def best_step(self) -> int | None:
        """The step that had the best value first; None where no value was finite."""
        return self._best_at(int(self.lines[-1]["step"])) if self.lines else None

    @property
    def best(self) -> float:
        """The best value so far."""
        values = {line["step"]: line[self.settings.metric] for line in self.lines}
        return math.nan if self.best_step is None else values[self.best_step]

    @property
    def is_hopeless(self) -> bool:
        """Whether the last `patience` evaluations were no better than one before them."""
        patience, best = self.settings.patience, self.best_step
        later = [line for line in self.lines if best is not None and line["step"] > best]
        return patience is not None and len(later) >= patience
