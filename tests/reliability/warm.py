"""Imported by the fork server (faults.py): a first call of each command, so that a forked one costs what it computes.

A fork of a process whose thread pools have started can crash in its first matrix product; one thread has no pool.
"""

from __future__ import annotations

import gc
import os
import sys
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import torch
import typer.main
from accelerate.state import AcceleratorState
from toy_commands import CACHE, COMPARE, EVAL, REPORT, SAMPLE, SWEEP, TRAIN, write_toy

from dpkd.cli.main import app, main


def _warm(root: Path) -> None:
    write_toy(root / "toy")
    (root / "work").mkdir()
    os.chdir(root / "work")
    os.environ["DPKD_CACHE"] = str(root / "cache")
    for command in (TRAIN, EVAL, SAMPLE, CACHE, REPORT, COMPARE, SWEEP):
        sys.argv = ["dpkd", *command]
        try:
            main()
        except SystemExit as stop:
            if stop.code:
                raise RuntimeError(f"{command} failed: {stop.code}") from stop


parser = typer.main.get_command(app)  # made once: a third of what a small command costs
typer.main.get_command = lambda _: parser
before = os.getcwd(), sys.argv, dict(os.environ)
torch.set_num_threads(1)
with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere:  # noqa: SIM117
    with redirect_stdout(nowhere), redirect_stderr(nowhere):
        try:
            _warm(Path(folder))
        finally:
            os.chdir(before[0])
            sys.argv = before[1]
            os.environ.clear()
            os.environ.update(before[2])
AcceleratorState._reset_state(reset_partial_state=True)
gc.freeze()  # a collection in a child touches, and so copies, none of this
