"""Adaptive text in whole runs: it follows the held-out loss, and a resumed run has its buffer back."""

from __future__ import annotations

import json

import pytest
import torch
from toy_runs import assert_same_model

from dpkd.errors import SettingsError
from dpkd.evaluation.results import Metric
from dpkd.run_metrics import read_metrics
from dpkd.train import dev as module
from dpkd.train import run
from dpkd.train.plan import make_plan
from dpkd.train.progress import Display
from dpkd.train.resume import resume_folder


def settings(toy, **more):
    dev = {"path": str(toy / "data.jsonl"), "limit": 4, "every": 2, "max_new_tokens": 4}
    return {"train.steps": 6, "text.source": "adaptive", "text.sampling.max_new_tokens": 6, "dev": dev, **more}


def worse_and_worse(monkeypatch):
    """The real evaluation, but for a held-out loss of 1, 2, 3, ..."""

    def evaluate(*args, **more):
        result, predictions, rows = original(*args, **more)
        calls.append(0)
        spoilt = {**result.metrics, "nll": Metric((float(len(calls)),))}
        return type(result)(**{**vars(result), "metrics": spoilt}), predictions, rows

    original, calls = module.evaluate_model, []
    monkeypatch.setattr(module, "evaluate_model", evaluate)
    return calls


def test_the_students_share_follows_the_held_out_loss(settings_of, toy, quiet, monkeypatch):
    worse_and_worse(monkeypatch)
    folder = run.train(settings_of("distillm", settings(toy, **{"text.rise": 0.5})), console=quiet)
    dev = [json.loads(line)["step"] for line in (folder.path / "dev.jsonl").read_text().splitlines()]
    assert dev == [0, 2, 4, 6], "the first is before training"
    lines = read_metrics(folder.metrics)
    assert [line["text/student_share"] for line in lines] == [0.0, 0.0, 0.5, 0.5, 1.0, 1.0]
    written = [{r["writer"] for r in json.loads(line)["responses"]} for line in folder.samples.read_text().splitlines()]
    assert written[0] == {"dataset"}
    assert written[-1] == {"student"}


def test_an_interrupted_run_has_its_share_and_buffer_back(settings_of, toy, quiet, stops, tmp_path):
    """A buffer of 4 is full after one step, so that later steps replay what was written before the interruption."""
    changes = settings(toy, **{"text.share": 1.0, "text.capacity": 4})
    whole = run.train(settings_of("distillm", changes), console=quiet)
    with stops(3):
        run.train(settings_of("distillm", changes | {"output": str(tmp_path / "stopped")}), console=quiet)
    torch.manual_seed(999)
    continued = resume_folder(tmp_path / "stopped", console=quiet)
    assert_same_model(whole, continued)
    assert whole.samples.read_text() == continued.samples.read_text()
    lines = [json.loads(line)["step"] for line in (continued.path / "dev.jsonl").read_text().splitlines()]
    assert lines == [0, 2, 4, 6]


def test_it_needs_held_out_rows_a_teacher_and_its_own_replay(settings_of, toy):
    rows = {"dev.path": str(toy / "data.jsonl")}
    adaptive = {"text.source": "adaptive"}
    student = {"student.model": str(toy / "gpt2"), "student.init": "pretrained", "student.layers": None}
    for loss, changes, teacher, problem in (
        ("distillm", adaptive, "teacher", r"text.source: adaptive follows .* needs held-out rows \(dev.path"),
        ("distillm", adaptive | student | rows, None, r"needs the teacher's model, with which"),
        (
            "distillm",
            adaptive | rows | {"text.refresh": "once"},
            "teacher",
            r"text\.refresh: the source adaptive has no such setting",
        ),
        (
            "seqkd",
            adaptive | rows,
            "teacher",
            r"text\.source: the loss seqkd takes text by dataset, teacher, not by student",
        ),
        (
            "kd",
            {"terms.extra.far": {"loss": "rkl", "text": {"source": "adaptive"}}},
            "teacher",
            r"terms\.extra\.far\.text\.source: adaptive follows",
        ),
    ):
        with pytest.raises(SettingsError, match=problem):
            settings_of(loss, changes, teacher=teacher)


def test_the_plan_says_what_decides(settings_of, toy, quiet):
    rows = dict(make_plan(settings_of("distillm", settings(toy)), Display(quiet)).sections["text"])
    assert rows["responses by"].startswith("data set; student with a probability of 0 at first, more when dev rises")
