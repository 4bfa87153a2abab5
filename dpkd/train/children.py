"""Processes of dpkd's own that never outlive this one and stop when it is asked to."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from types import FrameType
from typing import Any

import torch

_CHILD = "from dpkd.train.children import die_with_parent; die_with_parent(); from {module} import main; main()"
_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2)


class Children:
    """The processes that run now; a signal to stop goes to all of them, and no other is started after it."""

    def __init__(self) -> None:
        self.stopped_by: int | None = None
        self._running: set[subprocess.Popen[Any]] = set()
        self._lock = threading.RLock()  # a signal's handler may come while its own thread holds it

    def run(self, arguments: Sequence[str], **options: Any) -> int:
        """Run `dpkd ARGUMENTS` and return its exit code; that of the signal when it is too late to start."""
        process = self.start("dpkd.cli.main", arguments, **options)
        if process is None:
            return 128 + (self.stopped_by or signal.SIGTERM)
        try:
            return self.ended(process)
        except BaseException:
            process.terminate()  # it writes a checkpoint and goes
            self.ended(process)
            raise

    def start(self, module: str, arguments: Sequence[str], **options: Any) -> subprocess.Popen[Any] | None:
        """Start `main` of a module of this package; None when it is too late. `ended` must be called for it.

        It has a session of its own: Ctrl-C reaches it once, through us. `-P` keeps a `dpkd.py` in the working directory
        from being run in the place of this package.
        """
        command = [sys.executable, "-P", "-c", _CHILD.format(module=module), str(os.getpid()), *arguments]
        with self._lock:
            if self.stopped_by is not None:
                return None
            process = subprocess.Popen(command, start_new_session=True, **options)
            self._running.add(process)
        return process

    def ended(self, process: subprocess.Popen[Any]) -> int:
        """Wait for the end of a process, and return its exit code."""
        code = process.wait()
        with self._lock:
            self._running.discard(process)
        return code

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Pass a signal on."""
        with self._lock:
            if self.stopped_by is None:
                sys.stderr.write("stopping: the runs that go on write a checkpoint and end\n")
                self.stopped_by = number
            for process in self._running:
                process.send_signal(number)


def environment(device: str | None = None, side_by_side: int = 1) -> dict[str, str]:
    """The variables of a process on one device (None: on all) that is one of so many.

    It has its share of the cores, where the user did not set OMP_NUM_THREADS: PyTorch would take all of them in each.
    """
    threads = {} if side_by_side == 1 else {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // side_by_side))}
    return {**threads, **os.environ, **({} if device is None else {"CUDA_VISIBLE_DEVICES": device})}


def die_with_parent() -> None:
    """In a child: ask for SIGTERM when the parent, the first argument, dies, even by SIGKILL."""
    parent = int(sys.argv.pop(1))
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGTERM)
    if os.getppid() != parent:  # it died before
        sys.exit(128 + signal.SIGTERM)
    sys.argv[0] = "dpkd"
