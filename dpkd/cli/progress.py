"""A bar for the phases of a long command."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


EVERY = 30.0  # seconds between two lines where there is no terminal


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """A spinner while packages and plugins are imported, which takes seconds; none without a terminal."""
    from rich.console import Console

    console = Console(stderr=True)
    with console.status(what) if console.is_terminal else nullcontext():
        yield


@contextmanager
def shown(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """Gives `progress(what, done, of)`: a bar for each phase, with time elapsed and left.

    Without a terminal it is a line every half minute.
    """
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=16),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("elapsed"),
        TimeRemainingColumn(compact=True),
        TextColumn("left"),
    )
    if not console.is_terminal:
        yield _lines(console)
        return
    with Progress(*columns, console=console) as bars:
        tasks: dict[str, int] = {}

        def progress(what: str, done: int, of: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=of)
            bars.update(tasks[what], completed=done, total=of)  # type: ignore[arg-type]

        yield progress


def _lines(console: Console) -> Callable[[str, int, int], None]:
    """Progress for a file: a line when half a minute has passed since the last one."""
    began = said = time.monotonic()

    def progress(what: str, done: int, of: int) -> None:
        nonlocal said
        if (now := time.monotonic()) - said >= EVERY:
            said = now
            console.print(f"{what}: {done:,} of {of:,} after {now - began:,.0f} s", highlight=False)

    return progress
