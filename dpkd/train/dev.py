"""Evaluation while training: a few held-out rows, the best model kept, and a stop when it stays worse."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from dpkd.api import MetricSpec, SamplingSettings
from dpkd.api.teachers import Teacher
from dpkd.config.settings import DevSettings
from dpkd.errors import DpkdError
from dpkd.evaluation.evaluator import EvaluationSettings, evaluate_model
from dpkd.evaluation.inputs import Inputs
from dpkd.models.saving import save_model
from dpkd.run_folder import RunFolder


def direction_of(metric: str, specs: Mapping[str, MetricSpec]) -> int:
    """1 where higher is better, -1 where lower is. Raises DpkdError for a metric that is neither, or not there."""
    if metric not in specs:
        raise DpkdError(f"dev.metric: no metric is called {metric!r}; there are: {', '.join(specs)}")
    if not specs[metric].better:
        raise DpkdError(f"dev.metric: {metric} is neither better high nor low; choose another, such as rouge_l")
    return 1 if specs[metric].better == "higher" else -1


@dataclass
class Dev:
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
    lines: list[dict[str, float]] = field(default_factory=list)

    @property
    def file(self) -> Path:
        return self.folder.path / "dev.jsonl"

    @property
    def best_folder(self) -> Path:
        """The best model so far."""
        return self.folder.path / ".best"

    def restore(self, step: int) -> None:
        """Forget what an interrupted run did after a step; all of it before the first checkpoint."""
        if self.file.exists():
            rows = [
                json.loads(line) for line in self.file.read_text(encoding="utf-8").split("\n") if line.endswith("}")
            ]
            self.lines = [row for row in rows if row["step"] <= step and step > 0]
            if self.is_main:
                self.file.write_text("".join(json.dumps(row) + "\n" for row in self.lines), encoding="utf-8")

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
        better = not self.lines or self._sign * (line[self.settings.metric] - self.best) > 0
        self.lines.append(line)
        if self.is_main:
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**line, "seconds": time.monotonic() - began}) + "\n")
            if better:
                save_model(student, self.tokenizer, self.best_folder / "model")
        return line

    @cached_property
    def _sign(self) -> int:
        return direction_of(self.settings.metric, self.specs)

    @property
    def best(self) -> float:
        """The best value so far."""
        return max((self._sign * line[self.settings.metric] for line in self.lines), default=0.0) * self._sign

    @property
    def best_step(self) -> int:
        """The step that had it first."""
        return int(next(line["step"] for line in self.lines if line[self.settings.metric] == self.best))

    @property
    def is_hopeless(self) -> bool:
        """Whether the last `patience` evaluations were no better than one before them."""
        patience = self.settings.patience
        later = [line for line in self.lines if line["step"] > self.best_step] if self.lines else []
        return patience is not None and len(later) >= patience

    def finish(self) -> str:
        """Put the best model in the place of the last, which stays as `last/`; says so."""
        last, model = self.folder.path / "last", self.folder.model
        shutil.rmtree(last, ignore_errors=True)
        if self.best_step == self.lines[-1]["step"]:
            shutil.rmtree(self.best_folder, ignore_errors=True)
            return f"the last step is the best by dev {self.settings.metric}: {self.best:.4g}"
        model.rename(last)
        (self.best_folder / "model").rename(model)
        if (self.best_folder / "adapter").exists():
            (self.folder.path / "adapter").rename(last.with_name("last-adapter"))
            (self.best_folder / "adapter").rename(self.folder.path / "adapter")
        shutil.rmtree(self.best_folder, ignore_errors=True)
        best = f"the best by dev {self.settings.metric}: {self.best:.4g}"
        return f"model is that of step {self.best_step}, {best}; the last is {last}"
