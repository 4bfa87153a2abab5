"""Where the time of a run goes: every moment belongs to one phase, and measuring changes nothing."""

from __future__ import annotations

import io
import itertools
import re

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from dpkd.cli.main import app
from dpkd.train import run
from dpkd.train.timings import HostClock, Timings

SHARES = re.compile(r"([\d.]+) m?s \((.*)\)")


def ticking(*moments):
    return HostClock(iter(moments).__next__)


def test_each_moment_belongs_to_one_phase():
    timings = Timings(on=True, began=0.0, clock=ticking(1.0, 4.0, 5.0, 6.0))
    with timings("data"), timings("not counted: another phase is around it"):
        pass
    with timings("models"):
        pass
    assert timings.seconds == {"start": {"host": 2.0, "data": 3.0, "models": 1.0}}  # 0-1 and 4-5; 1-4; 5-6


def test_the_parts_of_a_run_follow_each_other():
    timings = Timings(on=True, began=0.0, clock=ticking(2.0))
    timings.begin_steps(ticking(10.0, 11.0, 14.0, 20.0))
    with timings("draw"):
        pass
    timings.begin_end(2, ticking(30.0, 31.0, 33.0, 33.5))
    with timings("card"):
        pass
    assert timings.lines() == [
        "timings: start, to the end of the first step: 2.00 s (host 2.00)",
        "timings: 2 more steps: 10.00 s, each 5000.00 ms (host 3500.00, draw 1500.00)",
        "timings: end: 3.50 s (card 2.00, host 1.50)",
    ]


def test_a_phase_that_fails_has_ended():
    timings = Timings(on=True, began=0.0, clock=ticking(1.0, 3.0, 7.0, 8.0))
    with pytest.raises(ValueError, match="bad"), timings("data"):
        raise ValueError("bad")
    with timings("models"):
        pass
    assert timings.seconds["start"] == {"host": 5.0, "data": 2.0, "models": 1.0}


def test_without_timings_no_clock_is_read():
    timings = Timings(clock=ticking(0.0))
    with timings("data"):
        timings.begin_steps(ticking())
    timings.begin_end(1, ticking())
    assert timings.lines() == []


def test_on_a_gpu_no_event_is_waited_for_before_the_end(far_clock):
    timings = Timings(on=True, began=0.0, clock=ticking(1.0))
    timings.begin_steps(far_clock)
    for _ in range(5):
        with timings("draw"):
            pass
    assert (
        sum(timings.seconds["steps"].values()) == 10 - torch.cuda.Event.behind
    )  # 11 moments; the last ones have not come
    timings.begin_end(5)
    assert timings.seconds["steps"] == {"host": 6.0, "draw": 5.0}


@pytest.mark.parametrize("loss", ["kd", "dpkd"])
def test_a_run_is_the_same_and_its_phases_sum_to_the_whole(loss, settings_of, quiet, tmp_path):
    """Bit for bit; each reading of the clock is one second later, so the sums count the readings."""
    found = []
    for on in (False, True):
        said, ticks = io.StringIO(), itertools.count(1.0)
        timings = Timings(on=on, began=0.0, clock=HostClock(ticks.__next__))
        settings = settings_of(loss, {"train.steps": 3, "output": str(tmp_path / f"{loss}-{on}")})
        folder = run.train(settings, console=Console(file=said, width=400), timings=timings)
        found.append((folder.model / "model.safetensors").read_bytes())
        lines = [line for line in said.getvalue().splitlines() if line.startswith("timings:")]
        assert bool(lines) is on
    assert found[0] == found[1]
    assert sum(timings.seconds["start"].values()) == next(ticks) - 1
    assert {"data", "models", "first step", "text"} <= timings.seconds["start"].keys()
    assert {"data", "draw", "teacher", "forward/backward", "update", "host"} <= timings.seconds["steps"].keys()
    assert {"checkpoint", "model", "card"} <= timings.seconds["end"].keys()
    for line in lines:
        total, shares = SHARES.search(line).groups()
        parts = [float(part.rsplit(" ", 1)[1]) for part in shares.split(", ") if part]
        assert float(total) == pytest.approx(sum(parts), abs=0.1)  # what rounds to nothing is not shown


def test_the_command_prints_them(toy, tmp_path):
    call = ["train", "--loss", "kd", "--teacher", str(toy / "teacher"), "--data", str(toy / "data.jsonl"), "--timings"]
    call += ["--output", str(tmp_path / "run"), "--set", "student.init=layers", "--set", "student.layers=2"]
    result = CliRunner().invoke(app, [*call, "--set", "train.steps=2", "--set", "train.device=cpu"])
    assert result.exit_code == 0, result.output
    assert "timings: start" in result.output
    assert "imports" in result.output
    assert "timings: 1 more steps" in result.output
