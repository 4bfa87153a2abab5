"""A sweep: stages in order, each run once, failures listed, mistakes found before anything runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from dpkd.errors import DpkdError, SettingsError
from dpkd.train.sweep import read_sweep, run_sweep, summary


@pytest.fixture
def written(toy, tmp_path):
    """`written(changes)`: a file of a sweep over toy models."""

    def make(**changes):
        values = {
            "output": str(tmp_path / "runs"),
            "settings": {
                "teacher.model": str(toy / "teacher"),
                "data.path": str(toy / "data.jsonl"),
                "train.steps": 1,
                "train.device": "cpu",
            },
            "stages": {
                "start": {"settings": {"loss.name": "sft", "student.init": "layers", "student.layers": 2}},
                "distil": {
                    "settings": {"student.model": "{start}"},
                    "matrix": {"loss.name": ["kd", "rkl"], "train.lr": [1e-4, 1e-3]},
                },
            },
        }
        values |= changes
        path = tmp_path / "sweep.yaml"
        path.write_text(yaml.safe_dump(values, sort_keys=False))
        return path

    return make


def test_the_runs_of_a_matrix_come_after_the_stage_that_they_share(written, tmp_path):
    plan = read_sweep(written())
    names = ["start", "distil-kd-lr_0.0001", "distil-kd-lr_0.001", "distil-rkl-lr_0.0001", "distil-rkl-lr_0.001"]
    assert [run.name for run in plan.runs] == names
    assert plan.runs[1].settings["student.model"] == str(tmp_path / "runs/start/model")
    assert (plan.runs[0].needs, plan.runs[1].needs) == ((), ("start",))


def test_runs_are_made_once_and_scored(written, toy, tmp_path):
    stages = yaml.safe_load(written().read_text())["stages"]
    stages["distil"]["matrix"] = {"loss.name": ["kd"]}
    how = {
        "data": [str(toy / "data.jsonl")],
        "stages": ["distil"],
        "options": {"greedy": True, "max_new_tokens": 4, "limit": 3},
    }
    path = written(stages=stages, evaluate=how)
    quiet = Console(quiet=True)
    assert run_sweep(read_sweep(path), console=quiet).done == ["start", "distil-kd"]
    scores = list((tmp_path / "runs/distil-kd/eval").rglob("scores.json"))
    assert json.loads(scores[0].read_text())["rows"] == 3
    assert not (tmp_path / "runs/start/eval").exists()
    again = run_sweep(read_sweep(path), console=quiet)
    assert (again.done, again.found) == ([], ["start", "distil-kd"])
    assert summary(again) == "0 runs done, 2 were there"


def test_a_failed_run_is_listed_and_the_others_go_on(written, tmp_path):
    stages = {
        "bad": {"settings": {"loss.name": "sft", "student.init": "layers", "student.layers": 9}},
        "good": {"settings": {"loss.name": "sft", "student.init": "layers", "student.layers": 2}},
        "later": {"settings": {"loss.name": "kd", "student.model": "{bad}"}},
    }
    outcome = run_sweep(read_sweep(written(stages=stages)), console=Console(quiet=True))
    assert outcome.done == ["good"]
    assert "9 layers asked for" in outcome.failed["bad"]
    assert outcome.skipped == {"later": "needs bad, which failed"}
    with pytest.raises(DpkdError, match=r"(?s)failed: bad: .*skipped: later: needs bad.*finished runs are skipped"):
        summary(outcome)


@pytest.mark.parametrize(
    ("stages", "problem"),
    [
        ({"a": {"settings": {"loss.name": "kdd"}}}, "a: loss: no loss is called 'kdd'"),
        ({"a": {"settings": {"loss.name": "kd", "student.model": "{b}"}}}, r"stages.a: uses {b}, but there is no"),
        ({"a": {"settings": {"student.model": "{b}"}}, "b": {"settings": {"student.model": "{a}"}}}, "wait for each"),
        ({"a": {"matrix": {"seed": [1, 2]}}, "b": {"settings": {"student.model": "{a}"}}}, "must be one run"),
        ({"a": {"setings": {}}}, "stages.a.setings: no such setting"),
    ],
)
def test_mistakes_are_found_before_anything_runs(stages, problem, written, tmp_path):
    with pytest.raises(SettingsError, match=problem):
        read_sweep(written(stages=stages))
    assert not Path(tmp_path / "runs").exists()


def test_a_mistake_of_many_runs_is_said_once(written, tmp_path):
    stages = {"all": {"settings": {"loss.name": "kd", "train.step": 3}, "matrix": {"seed": [1, 2, 3, 4]}}}
    path = written(stages=stages)
    with pytest.raises(SettingsError) as raised:
        read_sweep(path)
    said = [problem for problem in raised.value.problems if "train.step:" in problem]
    assert len(said) == 1
    assert said[0].startswith("all-seed_1, all-seed_2 and 2 more: train.step: no such setting")
