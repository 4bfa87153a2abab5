"""A `dpkd` command in a child process whose file system fails, or that is killed, at a chosen call.

The child is forked from a server that has imported everything, so that a case costs what the command costs. Faults
reach the command through the functions of `os` alone: the product has no hook for them.
"""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

CALLS = ("write", "fsync", "replace", "rename", "mkdir", "unlink", "rmdir", "chmod", "ftruncate", "link", "open")


@dataclass(frozen=True)
class Fault:
    """At the call number `at` (0-based) of the functions `calls`: `kill`, `full`, `full-once`, `torn`, or `none`.

    full       this call and all later writes find no space; the first of them may be `torn`: half is written
    full-once  this call alone
    """

    kind: str = "none"
    at: int = -1
    calls: tuple[str, ...] = CALLS


@dataclass(frozen=True)
class SweepOutcome:
    """How a child ended: its exit code (-9: killed; None: still running at the limit), what it printed, its calls."""

    code: int | None
    text: str
    calls: int

    @property
    def kind(self) -> str:
        """ok, killed, refused (a sentence), traceback or hang."""
        if self.code is None:
            return "hang"
        if "Traceback (most recent call last)" in self.text:
            return "traceback"
        return "ok" if self.code == 0 else "killed" if self.code == -signal.SIGKILL else "refused"


USED = (
    "accelerate",
    "transformers.models.llama.modeling_llama",
    "dpkd.cli.main",
    "dpkd.evaluation.evaluator",
    "dpkd.evaluation.target",
    "dpkd.report.comparison",
    "dpkd.report.page",
    "dpkd.rollout.sample_file",
    "dpkd.train.cache",
    "dpkd.train.resume",
)


# The server imports what the commands import and computes nothing: a fork of a process whose thread pools have started,
# such as pytest's after any forward, can crash in its first matrix product.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(list(USED))


def inject(fault: Fault, root: Path, count_file: int) -> None:
    """Make the functions of `os` count, and fail, from now on, for files under `root`."""
    seen = 0
    descriptors: dict[int, bool] = {}

    def below(target: object) -> bool:
        if isinstance(target, int):
            if target not in descriptors:
                descriptors[target] = os.readlink(f"/proc/self/fd/{target}").startswith(str(root))
            return descriptors[target]
        return str(root) in os.path.abspath(os.fsdecode(target)) if isinstance(target, str | bytes | Path) else False

    def wrapped(name: str):
        real = getattr(os, name)

        def call(*arguments, **options):
            nonlocal seen
            counted = below(arguments[0]) and not (name == "open" and not arguments[1] & (os.O_WRONLY | os.O_RDWR))
            if counted:
                here, seen = seen, seen + 1
                os.pwrite(count_file, str(seen).encode(), 0)
                if here == fault.at and fault.kind == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                grows = name in ("write", "open", "mkdir", "fsync", "link")
                now = (
                    here == fault.at if fault.kind == "full-once" else here >= fault.at and (grows or here == fault.at)
                )
                if fault.at >= 0 and now and fault.kind in ("full", "full-once", "torn"):
                    if name == "write" and fault.kind == "torn" and here == fault.at:
                        real(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2])
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            found = real(*arguments, **options)
            if name == "open":
                descriptors.pop(found, None)
            return found

        return call

    for name in fault.calls:
        setattr(os, name, wrapped(name))


def dpkd(arguments: Sequence[str], folder: Path, fault: Fault = Fault(), limit: float = 120.0) -> SweepOutcome:
    """Run `dpkd ARGUMENTS` in `folder`, in a child of the fork server, under a fault."""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder.with_name(f"{folder.name}.log")
    count = folder.with_name(f"{folder.name}.calls")
    child = SERVER.Process(target=_child, args=(list(arguments), folder, fault, log, count, dict(os.environ)))
    child.start()
    child.join(limit)
    code = child.exitcode
    if code is None:
        child.kill()
        child.join()
    calls = int(count.read_text() or 0)
    return SweepOutcome(code, log.read_text(encoding="utf-8", errors="replace"), calls)


def _child(
    arguments: Sequence[str], folder: Path, fault: Fault, log: Path, count: Path, environment: dict[str, str]
) -> None:
    """Never returns."""
    code = 70
    try:
        os.environ.update(environment)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        counter = os.open(count, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        os.chdir(folder)
        os.environ["DPKD_CACHE"] = str(folder / "cache")
        sys.argv = ["dpkd", *arguments]
        inject(fault, folder, counter)
        from dpkd.cli.main import main

        main()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
