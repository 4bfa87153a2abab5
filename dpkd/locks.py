"""The one lock: a file or folder that one process writes at a time, and clears of what killed ones left."""

from __future__ import annotations

import errno
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dpkd.errors import DpkdError
from dpkd.io import dumps, parsed, remove_leftovers, storage_errors

try:
    import fcntl
except ImportError:  # no advisory locks on Windows: one process at a time there
    fcntl = None  # type: ignore[assignment]


@contextmanager
def lock(path: Path, what: str, *, wait: bool = False) -> Iterator[None]:
    """Hold the lock file `path` for the block, so that no second process writes `what`.

    The operating system releases it when its owner dies, however that happens: no stale lock is left.
    Raises DpkdError, naming the owner, when another process holds it; or waits for that one.
    """
    if fcntl is None:
        yield
        return
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _locked(path, what, wait)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is held: who waits for this file looks again
        os.close(descriptor)


@contextmanager
def folder_lock(folder: Path, *inside: str, what: str | None = None) -> Iterator[None]:
    """Hold the lock of a folder; what killed processes left half-written there, and in folders `inside`, is deleted.

    Raises DpkdError as `lock` does; `what` is the name of the folder for people.
    """
    with lock(folder / ".lock", what or str(folder)):
        for place in (folder, *(folder / name for name in inside)):
            remove_leftovers(place)
        yield


@contextmanager
def file_lock(file: Path, *beside: Path, wait: bool = False) -> Iterator[None]:
    """The same for a file, and for files `beside` it that are written with it; others in its folder stay."""
    with lock(file.with_name(f".{file.name[:100]}.lock"), str(file), wait=wait):
        for one in (file, *beside):
            remove_leftovers(one.parent, of=one.name)
        yield


def _locked(path: Path, what: str, wait: bool) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            _flock(descriptor, what, wait)
            if _is_at(descriptor, path):
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, dumps(_owner()).encode(), 0)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its owner removed it in between


def _flock(descriptor: int, what: str, wait: bool) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        owner = parsed(os.pread(descriptor, 4096, 0)) or {}
        raise DpkdError(
            f"{what} is being written by another process: {_named(owner)}. "
            "Wait for it to end, or stop it, and run this command again."
        ) from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):  # a file system without locks
            raise


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _owner() -> dict[str, Any]:
    return {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}


def _named(owner: Mapping[str, Any]) -> str:
    if not {"pid", "host", "since"} <= owner.keys():
        return "it has just begun"
    return f"process {owner['pid']} on {owner['host']}, since {owner['since']}"
