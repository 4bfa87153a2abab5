"""Fixtures for tests of what must survive: faults that the file system injects, and toy runs."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from toy_runs import _fresh_accelerate, quiet, settings_of, toy  # noqa: F401


@contextmanager
def failing(call: str, at: int, *, torn: bool = False, once: bool = False, code: int = errno.ENOSPC) -> Iterator[None]:
    """From its call number `at` on (0-based), or `once` then, `os.CALL` fails; a torn write writes half before."""
    real, count = getattr(os, call), 0

    def faulty(*arguments, **options):
        nonlocal count
        count += 1
        if count <= at or (once and count > at + 1):
            return real(*arguments, **options)
        if torn and call == "write" and count == at + 1:
            descriptor, content = arguments
            real(descriptor, bytes(content)[: len(content) // 2])
        raise OSError(code, os.strerror(code))

    setattr(os, call, faulty)
    try:
        yield
    finally:
        setattr(os, call, real)


@pytest.fixture
def faults():
    """`with faults("fsync", 3): ...`: see `failing`."""
    return failing


@pytest.fixture(autouse=True)
def _hangups_are_heard():
    """A process that was started with hangups ignored (nohup) hands that down to all that it starts."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)
