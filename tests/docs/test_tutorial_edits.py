"""The edits of docs/write-a-loss.md do what it says: first the reference disagrees, then the loss follows it."""

from __future__ import annotations

import runpy
import sys
from importlib import import_module
from pathlib import Path

import pytest

from dpkd.scaffold import names_of, write_package
from dpkd.testing import NonConforming, Outcome, check_loss

ROOT = Path(__file__).parents[2]
SCRIPT = runpy.run_path(str(ROOT / "benchmarks/ten_minutes.py"))
STEPS = list(SCRIPT["steps"]((ROOT / "docs/write-a-loss.md").read_text(encoding="utf-8")))
EDITS = [block for kind, block in STEPS if kind == "diff"]
NAMES = names_of("hello", {})


@pytest.fixture
def failures(tmp_path, monkeypatch):
    """`failures(edits, power)`: names of the checks that fail after so many edits."""

    def of(edits: list[str], power: float) -> set[str]:
        folder = tmp_path / f"{len(edits)}-{power}"
        write_package(NAMES, "token", folder)
        for edit in edits:
            SCRIPT["apply"](edit, folder)
        monkeypatch.syspath_prepend(folder)
        for name in (NAMES.module, NAMES.test):
            sys.modules.pop(name, None)
        loss, test = import_module(NAMES.module), import_module(NAMES.test)
        try:
            check_loss(loss.SPEC, config={"power": power}, reference=test.reference)
        except NonConforming as error:
            return set(error.report.named(Outcome.FAILED))
        return set()

    yield of
    for name in (NAMES.module, NAMES.test):
        sys.modules.pop(name, None)


def test_the_reference_first_then_the_loss(failures):
    assert len(EDITS) == 3
    assert failures([], 2.0) == set()
    assert failures(EDITS[:1], 1.0) == set()
    assert failures(EDITS[:1], 2.0) == {"matches_reference"}
    assert failures(EDITS, 2.0) == failures(EDITS, 1.0) == set()


def test_without_the_clamp_it_fails(failures):
    assert ".clamp(min=1e-9)" in EDITS[1]
    assert failures([EDITS[0], EDITS[1].replace(".clamp(min=1e-9)", ""), EDITS[2]], 2.0)


def test_the_script_runs_every_command_or_says_why_not():
    commands = [step for kind, step in STEPS if kind == "bash"]
    assert len(commands) > 12
    left_out = {step for step in commands if any(step.startswith(start) for start in SCRIPT["LEFT_OUT"])}
    assert {step.split()[0] for step in left_out} == {"dpkd", "python"}
    assert {"dpkd new-loss hello --kind token", "dpkd check-loss hello"} <= set(commands) - left_out
