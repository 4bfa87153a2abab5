"""Callbacks of a user: what they see of a run, and how they end it."""

from __future__ import annotations

import pytest

import dpkd
from dpkd.api import Callback
from dpkd.run_metrics import read_metrics


class Seen(Callback):
    """Writes down each call; stops the run after a step, or fails there."""

    def __init__(self, stop_after: int | None = None, fail_after: int | None = None) -> None:
        self.calls: list[tuple[str, int | None]] = []
        self.lines: list[float] = []
        self.stop_after, self.fail_after = stop_after, fail_after

    def on_start(self, training, step):
        self.calls.append(("start", step))

    def on_step(self, training, step):
        self.calls.append(("step", step))
        assert training.responses is not None
        assert len(training.responses.responses) > 0
        if step == self.stop_after:
            training.stop("enough")
        if step == self.fail_after:
            raise RuntimeError("a callback failed")

    def on_log(self, training, step, line):
        self.calls.append(("log", step))
        self.lines.append(line["loss/total"])

    def on_end(self, training):
        self.calls.append(("end", None))


@pytest.fixture
def settings(toy):
    return {
        "student.init": "layers",
        "student.layers": 1,
        "train.steps": 4,
        "train.log_every": 2,
        "train.batch_size": 4,
    }


def _train(toy, tmp_path, settings, callback):
    return dpkd.train(
        loss="kd",
        teacher=str(toy / "teacher"),
        data=str(toy / "data.jsonl"),
        output=tmp_path / "run",
        settings=settings,
        callbacks=[callback],
    )


def test_it_sees_every_step_and_what_is_logged(toy, tmp_path, settings):
    seen = Seen()
    run = _train(toy, tmp_path, settings, seen)
    log = [("log", 1), ("log", 2), ("log", 4)]
    steps = [("step", n) for n in (1, 2, 3, 4)]
    assert [call for call in seen.calls if call in steps] == steps
    assert [call for call in seen.calls if call in log] == log
    assert seen.calls.index(("log", 2)) < seen.calls.index(("step", 2))
    assert (seen.calls[0], seen.calls[-1]) == (("start", 0), ("end", None))
    assert seen.lines == [line["loss/total"] for line in read_metrics(run.metrics)]


def test_it_may_end_the_run_which_is_finished_then(toy, tmp_path, settings, capsys):
    seen = Seen(stop_after=3)
    run = _train(toy, tmp_path, settings, seen)
    assert [n for what, n in seen.calls if what == "step"] == [1, 2, 3]
    assert run.is_finished
    assert "enough" in capsys.readouterr().out


def test_one_that_fails_still_ends_the_others(toy, tmp_path, settings):
    seen = Seen(fail_after=2)
    with pytest.raises(RuntimeError, match="a callback failed"):
        _train(toy, tmp_path, settings, seen)
    assert seen.calls[-1] == ("end", None)
