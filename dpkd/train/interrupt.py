"""Stopping at a step's end when the user asks, so that a checkpoint can be written."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class StopRequest:
    """Becomes true when SIGINT, SIGTERM or SIGHUP arrives; a second SIGINT interrupts at once."""

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


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Collect stop requests for the time of the block (in the main thread only)."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    # What the caller has switched off stays off: `nohup` ignores SIGHUP.
    heard = [number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, request) for number in heard}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
