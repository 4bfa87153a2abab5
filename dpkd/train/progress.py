"""What a user sees while a run works: a bar with speed and time left, or plain lines where there is no terminal."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from tqdm import tqdm

# What of the metrics is said at each logged step, with its short name.
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
        self._side: Progress | None = None
        self._notebook: Any = None
        self._title = ""
        self._last = self._began = time.monotonic()
        self._start = self._total = 0

    def say(self, text: str) -> None:
        """One line, above the bar if there is one."""
        if self._visible:
            self.console.print(text, highlight=False, markup=False)

    @contextmanager
    def bar(self, title: str, total: int, start: int = 0) -> Iterator[Display]:
        """Show a bar for the time of the block."""
        if self._visible and self.console.is_jupyter:
            with tqdm(total=total, initial=start, desc=title) as self._notebook:
                yield self
            self._notebook = None
            return
        if not self._visible or not self.console.is_terminal:
            self.say(f"{title}: {total - start} to do")
            self._began, self._start, self._total = time.monotonic(), start, total
            yield self
            self._total = 0
            return
        self._title = title
        with self._bars() as self._progress:
            self._task = self._progress.add_task(title, total=total, completed=start, speed="")
            try:
                yield self
            finally:
                self._progress.refresh()
                self._progress = None

    def _bars(self) -> Progress:
        """Whole at 70 columns: what is measured goes into lines of its own, which stay to be read."""
        return Progress(
            SpinnerColumn(),  # moves while a long step is silent
            TextColumn("{task.description}"),
            BarColumn(bar_width=8),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("elapsed"),
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
            TextColumn("{task.fields[speed]}"),
            console=self.console,
            speed_estimate_period=600,  # of steps longer than half a minute, rich would know no speed
        )

    def at(self, done: int, metrics: Mapping[str, Any] | None = None) -> None:
        """Move the bar; with metrics also say them."""
        if self._notebook is not None:  # a line for each logged step would fill the notebook
            self._notebook.update(done - self._notebook.n)
            self._notebook.set_postfix_str(_summary(metrics) if metrics is not None else self._notebook.postfix or "")
            return
        if metrics is not None:
            self.say(f"step {done}  {_summary(metrics)}{self._left(done)}")
        if self._progress is not None:
            self._progress.update(self._task, completed=done, description=self._title)
            if metrics is not None and "tokens_per_second" in metrics:
                self._progress.update(self._task, speed=f"{metrics['tokens_per_second']:,.0f} tok/s")

    def _left(self, done: int) -> str:
        """Time to go, where no bar shows it."""
        passed = time.monotonic() - self._began
        if not self._start < done < self._total:
            return ""
        left = passed / (done - self._start) * (self._total - done)
        return f"  left {timedelta(seconds=round(left))}"

    def pulse(self, done: int, total: int) -> None:
        """Where the writing of responses is: in place of the bar's title, or in a bar of its own."""
        if self._progress is not None:
            self._progress.update(self._task, description=f"writing {done}/{total}")
        elif self._visible and self.console.is_terminal:
            if self._side is None:
                self._side = self._bars()
                self._side.start()
                self._task = self._side.add_task("writing responses", total=total, speed="")
            self._side.update(self._task, completed=done, total=total)
            if done >= total:
                self.close()
        elif (now := time.monotonic()) - self._last > 10:
            self._last = now
            self.say(f"  writing responses: {done}/{total}")

    def close(self) -> None:
        """Leave the console as it was, whatever was under way."""
        if self._side is not None:
            self._side.stop()
            self._side = None
