"""What a user sees while a run works: a bar with speed and time left, or plain lines where there is no terminal."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

__all__ = ["Display"]

# What of the metrics is shown beside the bar, with its short name.
_SHOWN = {
    "loss/total": "loss",
    "kl/forward": "fKL",
    "kl/reverse": "rKL",
    "reward/margin": "margin",
    "tokens_per_second": "tok/s",
}


def _summary(metrics: Mapping[str, Any]) -> str:
    shown = [(short, metrics[name]) for name, short in _SHOWN.items() if name in metrics]
    return "  ".join(f"{short} {value:,.0f}" if short == "tok/s" else f"{short} {value:.3f}" for short, value in shown)


class Display:
    """Progress of one task at a time on a console; silent on all but the main process."""

    def __init__(self, console: Console, *, is_main: bool = True) -> None:
        self.console = console
        self._visible = is_main
        self._progress: Progress | None = None
        self._last = time.monotonic()

    def say(self, text: str) -> None:
        """One line, above the bar if there is one."""
        if self._visible:
            self.console.print(text, highlight=False)

    @contextmanager
    def bar(self, title: str, total: int, start: int = 0) -> Iterator[Display]:
        """Show a bar for the time of the block."""
        if not self._visible or not self.console.is_terminal:
            self.say(f"{title}: {total - start} to do")
            yield self
            return
        columns = (
            TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("<"), TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
        )  # fmt: skip
        with Progress(*columns, console=self.console, transient=False) as self._progress:
            self._task = self._progress.add_task(title, total=total, completed=start, note="")
            try:
                yield self
            finally:
                self._progress.refresh()
        self._progress = None

    def at(self, done: int, metrics: Mapping[str, Any] | None = None) -> None:
        """Move the bar; with metrics also say them."""
        if self._progress is not None:
            self._progress.update(self._task, completed=done)
            if metrics is not None:
                self._progress.update(self._task, note=_summary(metrics))
        elif metrics is not None:
            self.say(f"step {done}  {_summary(metrics)}")

    def pulse(self, done: int, total: int) -> None:
        """A word every ten seconds of a long side task (sampling, say) under a bar that stands."""
        now = time.monotonic()
        if self._progress is not None:
            self._progress.update(self._task, note=f"writing responses {done}/{total}")
        elif now - self._last > 10:
            self._last = now
            self.say(f"  writing responses: {done}/{total}")
