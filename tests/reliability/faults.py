"""A `dpkd` command in a child process whose file system fails, or that is killed, at a chosen call.

The child is forked from a server that has run each command once, so that a case costs what the command costs. Faults
reach the command through the functions of `os` alone: the product has no hook for them.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

CPU_LIMIT = 60  # seconds that a command may compute; the wall clock of a busy machine says little
CALLS = ("write", "fsync", "replace", "rename", "mkdir", "unlink", "rmdir", "chmod", "ftruncate", "link", "open")
GROWS = ("write", "open", "mkdir", "fsync", "link")  # what needs space


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
    """How a child ended: its exit code (-9: killed; None: a limit was reached), what it printed, its calls by name."""

    code: int | None
    text: str
    calls: list[str]

    @property
    def kind(self) -> str:
        """ok, killed, refused (a sentence), traceback (also one that no part of the command foresaw) or hang."""
        if self.code is None:
            return "hang"
        if "Traceback (most recent call last)" in self.text or "unexpected error, " in self.text:
            return "traceback"
        return "ok" if self.code == 0 else "killed" if self.code == -signal.SIGKILL else "refused"


# Never pytest itself: a fork of a process whose thread pools have started can crash in its first matrix product.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["warm", "faults"])
_HERE = str(Path(__file__).parent)


def _serve() -> None:
    """Start the server, unless it runs; what it preloads is found by PYTHONPATH alone, and is skipped if it is not."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([_HERE, *([before] if before else [])])
    try:
        forkserver.ensure_running()
    finally:
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before


class Injector:
    """Notes the calls of `os` on files under `root` by name; one of them, or from one on, fails as the fault says.

    With `branches`, a folder, nothing fails here: at each call, and for each fault that is possible there, the process
    forks. The fork goes on in a copy of `root` and meets the fault; how it ended is a line of `branches`/first.jsonl.
    """

    def __init__(self, root: Path, noted: int, fault: Fault, branches: Path | None = None) -> None:
        self.root, self.noted, self.fault, self.branches = str(root), noted, fault, branches
        self.seen, self.note, self.is_busy = 0, os.write, False
        self.states: dict[str, str] = {}
        for name in fault.calls:
            setattr(os, name, self._wrapped(name, getattr(os, name)))

    def _wrapped(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if not self.is_busy and self._counts(name, arguments):
                here, self.seen = self.seen, self.seen + 1
                self.note(self.noted, f"{name}\n".encode())
                if self.branches is not None:
                    self._branch(here, name)
                self._fail(here, name, real, arguments)
            return real(*arguments, **options)

        return call

    def _counts(self, name: str, arguments: tuple[Any, ...]) -> bool:
        if name == "open" and not arguments[1] & (os.O_WRONLY | os.O_RDWR):
            return False
        target = arguments[0]
        if isinstance(target, int):
            return os.readlink(f"/proc/self/fd/{target}").startswith(f"{self.root}/")
        return f"{os.path.abspath(os.fsdecode(target))}/".startswith(f"{self.root}/")

    def _fail(self, here: int, name: str, real: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        kind, is_here = self.fault.kind, here == self.fault.at
        if kind == "kill" and is_here:
            os.kill(os.getpid(), signal.SIGKILL)
        goes_on = kind in ("full", "torn") and 0 <= self.fault.at < here and name in GROWS
        if goes_on or (is_here and kind in ("full", "torn", "full-once")):
            if kind == "torn" and is_here and name == "write":
                real(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _branch(self, here: int, name: str) -> None:
        self.is_busy = True
        sys.stdout.flush()
        sys.stderr.flush()
        for fault in faults_at(here, name):
            folder = self.branches / f"{fault.kind}-{here}"
            child = os.fork()
            if child == 0:
                self._move_to(folder, fault)
                self.is_busy = False
                return
            code = _waited(child)
            text = folder.with_suffix(".log").read_text(encoding="utf-8", errors="replace")
            state = state_of(folder)
            first = self.states.setdefault(state, folder.name)
            if first != folder.name:  # what the next command finds is the same, to the byte
                shutil.rmtree(folder)
            row = {"kind": fault.kind, "at": here, "call": name, "code": code, "text": text[-3000:], "state": first}
            with (self.branches / "first.jsonl").open("a", encoding="utf-8") as log:
                log.write(json.dumps(row) + "\n")
        self.is_busy = False

    def _move_to(self, folder: Path, fault: Fault) -> None:
        """In a fork: go on in a copy of the root, with the files that are open opened there."""
        shutil.copytree(self.root, folder, symlinks=True)
        for name in os.listdir("/proc/self/fd"):
            with suppress(OSError):
                target = os.readlink(f"/proc/self/fd/{name}")
                if f"{target}/".startswith(f"{self.root}/"):
                    flags, place = fcntl.fcntl(int(name), fcntl.F_GETFL), 0
                    if not os.path.isdir(target):
                        place = os.lseek(int(name), 0, os.SEEK_CUR)
                    own = os.open(f"{folder}{target.removeprefix(self.root)}", flags)
                    os.dup2(own, int(name), inheritable=False)
                    os.close(own)
                    if place:
                        os.lseek(int(name), place, os.SEEK_SET)
        output = os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        self.noted = os.open(os.devnull, os.O_WRONLY)
        self.root, self.fault, self.branches = str(folder), fault, None
        os.chdir(folder)


def faults_at(here: int, name: str) -> list[Fault]:
    """What may befall a call: a kill, or no space: from then on, once, or for half of a write."""
    kinds = ("kill", "full", "full-once", *(("torn",) if name == "write" else ()))
    return [Fault(kind, here) for kind in kinds]


def state_of(folder: Path) -> str:
    """A hash of all that is in a folder; random parts of temporary names, and what a sweep says, do not count."""
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        name = re.sub(r"\.[0-9a-f]{12}\.tmp", ".tmp", str(path.relative_to(folder)))
        content = path.read_bytes() if path.is_file() and path.suffix != ".log" else b""
        found.update(f"{name}\0{path.is_dir()}\0{len(content)}\0".encode() + content)
    return found.hexdigest()


def _waited(child: int, limit: float = 300.0) -> int | None:
    """The exit code of a child, as in subprocess; None when it did not end in time."""
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            code = os.waitstatus_to_exitcode(status)
            return None if code == -signal.SIGXCPU else code
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def dpkd(
    arguments: Sequence[str], folder: Path, fault: Fault = Fault(), limit: float = 900.0, branches: Path | None = None
) -> SweepOutcome:
    """Run `dpkd ARGUMENTS` in `folder`, in a child of the fork server, under a fault, or with `branches` (Injector)."""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder.with_name(f"{folder.name}.log")
    names = folder.with_name(f"{folder.name}.calls")
    given = (list(arguments), folder, fault, log, names, dict(os.environ), branches)
    _serve()
    child = SERVER.Process(target=_child, args=given)
    child.start()
    child.join(limit if branches is None else None)
    code = child.exitcode
    if code is None:
        child.kill()
        child.join()
    calls, text = names.read_text().split(), log.read_text(encoding="utf-8", errors="replace")
    return SweepOutcome(None if code == -signal.SIGXCPU else code, text, calls)


def _child(
    arguments: Sequence[str],
    folder: Path,
    fault: Fault,
    log: Path,
    names: Path,
    environment: dict[str, str],
    branches: Path | None,
) -> None:
    """Never returns."""
    code = 70
    try:
        os.environ.clear()
        os.environ.update(environment)
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_LIMIT, CPU_LIMIT + 5))
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        noted = os.open(names, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        os.chdir(folder)
        os.environ["DPKD_CACHE"] = "cache"  # in the working directory: a fork has its own
        sys.argv = ["dpkd", *arguments]
        Injector(folder, noted, fault, branches)
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
