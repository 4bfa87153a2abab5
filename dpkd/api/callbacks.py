"""Callbacks: what happens beside training, for `dpkd.train(callbacks=[...])` and for the engine's own extras."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from dpkd.api.sources import StepResponses


class Training(Protocol):
    """What a callback sees of a run."""

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""

    @property
    def path(self) -> Path:
        """The run folder."""

    @property
    def responses(self) -> StepResponses | None:
        """Those of the main loss at the last step; None before the first."""

    def say(self, text: str) -> None:
        """Print a line, on the main process."""

    def stop(self, reason: str) -> None:
        """End the run after this step, as finished. All processes must call it at the same step."""

    def evaluated(self, step: int, line: Mapping[str, float]) -> None:
        """Tell all callbacks, and the sources that follow it, of an evaluation on held-out rows."""

    def lend(self, work: Callable[[nn.Module], Any]) -> Any:
        """Give the student, with whole weights and without gradients, to some work. All processes call it together."""


class Callback:
    """Something to do beside training. Every method is called on every process, in the order of the list.

    The built-in ones (log, trackers, samples, dev set, guard) come first, checkpoints last. A callback that changes the
    student changes what is trained; it has no part in exact resume.
    """

    def on_start(self, training: Training, step: int) -> None:
        """Before the first step of this call; an interrupted run has done `step` steps."""

    def on_step(self, training: Training, step: int) -> None:
        """After an optimizer step; `step` counts from 1."""

    def on_log(self, training: Training, step: int, line: Mapping[str, Any]) -> None:
        """After a logged step: the metrics since the last logged step, over all processes (docs/metrics.md)."""

    def on_evaluate(self, training: Training, step: int, line: Mapping[str, float]) -> None:
        """After an evaluation on the development set."""

    def on_end(self, training: Training) -> None:
        """When the loop has ended, whatever ended it."""
