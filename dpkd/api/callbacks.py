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
        """Print the line `text`, on the main process."""

    def stop(self, reason: str) -> None:
        """End the run after this step, as finished, and print the `reason`. All processes call it at the same step."""

    def evaluated(self, step: int, line: Mapping[str, float]) -> None:
        """Tell all callbacks, and the sources that follow it, of an evaluation on held-out rows.

        step  after which it was made
        line  its metrics by name
        """

    def lend(self, work: Callable[[nn.Module], Any]) -> Any:
        """Call `work` with the student, whose weights are whole, without gradients, and return what it returns.

        All processes call it together.
        """


class Callback:
    """Something to do beside training. Every method is called on every process, in the order of the list.

    `training` is what the callback sees of the run, and `step` counts optimizer steps from 1.

    The built-in ones (log, trackers, samples, dev set, guard) come first, checkpoints last. A callback that changes the
    student changes what is trained; it has no part in exact resume.
    """

    def on_start(self, training: Training, step: int) -> None:
        """Before the first step of this call of `training`; an interrupted run has done `step` steps."""

    def on_step(self, training: Training, step: int) -> None:
        """After the optimizer step `step` of `training`."""

    def on_log(self, training: Training, step: int, line: Mapping[str, Any]) -> None:
        """After a logged step `step` of `training`.

        `line` has the metrics since the last logged step, over all processes (docs/metrics.md).
        """

    def on_evaluate(self, training: Training, step: int, line: Mapping[str, float]) -> None:
        """After an evaluation of `training` on the development set at `step`, whose metrics are in `line`."""

    def on_end(self, training: Training) -> None:
        """When the loop of `training` has ended, whatever ended it."""
