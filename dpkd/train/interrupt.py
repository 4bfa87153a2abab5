"""What happens when the user asks a process to stop: a handler for the time of a block."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

HandlerT = TypeVar("HandlerT", bound=Callable[[int, FrameType | None], Any])

_STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


@contextmanager
def on_stop(handler: HandlerT) -> Iterator[HandlerT]:
    """Have SIGINT, SIGTERM and SIGHUP call a handler for the time of the block (in the main thread only)."""
    if threading.current_thread() is not threading.main_thread():
        yield handler
        return
    # What the caller has switched off stays off: `nohup` ignores SIGHUP.
    heard = [number for number in _STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in heard}
    try:
        yield handler
    finally:
        for number, old in before.items():
            signal.signal(number, old)


class StopSignal:
    """The signal that asks to stop: the block ends at once, where no run catches the signal.

    A run that trains has its own handler meanwhile, and writes a checkpoint; loading and scoring can be done again.
    """

    stopped_by: int | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.stopped_by = number
        raise KeyboardInterrupt


class StopRequest:
    """Becomes true when a signal asks to stop, at the end of a step; a second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.asked = False
        self.signal_number = int(signal.SIGINT)

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.asked:
            sys.stderr.write("stopping after this step, with a checkpoint; once more stops at once\n")
            self.signal_number = number
        self.asked = True
