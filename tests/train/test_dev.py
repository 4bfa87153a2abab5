"""Evaluation while training: the best model is kept, a worse run stops, and a resumed one knows what was."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from dpkd.errors import DpkdError
from dpkd.evaluation.evaluator import metric_specs
from dpkd.evaluation.results import Metric
from dpkd.plugins import load_registry
from dpkd.run_folder import RunFolder
from dpkd.train import dev as module
from dpkd.train import run
from dpkd.train.dev import direction_of
from dpkd.train.plan import dry_run
from dpkd.train.resume import resume_folder


def rows_of(toy, **more):
    return {"path": str(toy / "data.jsonl"), "limit": 6, "every": 2, "max_new_tokens": 4, **more}


def lines(folder):
    return [json.loads(line) for line in (folder.path / "dev.jsonl").read_text().splitlines()]


def test_the_student_is_scored_as_it_trains_and_the_last_is_kept_too(settings_of, toy, quiet):
    folder = run.train(
        settings_of("kd", {"train.steps": 5, "train.lr": 0.01, "dev": rows_of(toy, metric="nll")}), console=quiet
    )
    rows = lines(folder)
    assert [row["step"] for row in rows] == [2, 4, 5]
    assert {"rouge_l", "forward_kl", "reverse_kl", "nll"} <= rows[0].keys()
    assert rows[-1]["nll"] < rows[0]["nll"], "the last step is the best, so there is one model"
    assert not (folder.path / "last").exists()
    assert not (folder.path / ".best").exists()


def _worse_from(monkeypatch, step):
    """The metric of the real evaluation, spoilt from a step on."""

    def module_result(model, inputs, tokenizer, **more):
        result, predictions, rows = original(model, inputs, tokenizer, **more)
        count["calls"] += 1
        value = 50.0 if count["calls"] * 2 <= step else 10.0

        return (
            type(result)(**{**vars(result), "metrics": {**result.metrics, "rouge_l": Metric((value,))}}),
            predictions,
            rows,
        )

    original, count = module.evaluate_model, {"calls": 0}
    monkeypatch.setattr(module, "evaluate_model", module_result)


def test_the_best_model_is_the_runs_and_patience_ends_it(settings_of, toy, quiet, monkeypatch):
    _worse_from(monkeypatch, 2)
    resolved = settings_of("kd", {"train.steps": 20, "train.lr": 0.01, "dev": rows_of(toy, patience=2)})
    folder = run.train(resolved, console=quiet)
    assert [row["step"] for row in lines(folder)] == [2, 4, 6], "two evaluations that are no better, then the end"
    best, last = (load_file(folder.path / name / "model.safetensors") for name in ("model", "last"))
    assert any(not torch.equal(best[name], last[name]) for name in best)


def test_an_interrupted_run_evaluates_nothing_twice(settings_of, toy, quiet, stops, tmp_path):
    changes = {"train.steps": 6, "dev": rows_of(toy)}
    whole = run.train(settings_of("kd", changes), console=quiet)
    resolved = settings_of("kd", changes | {"output": str(tmp_path / "stopped")})
    with stops(3):
        run.train(resolved, console=quiet)
    folder = RunFolder(tmp_path / "stopped")
    with (folder.path / "dev.jsonl").open("a") as file:
        file.write('{"step": 4, "rouge_l": 99.0, "nll": 0.1}\n')  # after the checkpoint: it did not happen
    resume_folder(folder.path, console=quiet)
    for one, two in zip(lines(whole), lines(folder), strict=True):
        assert {**one, "seconds": 0} == pytest.approx({**two, "seconds": 0})


def test_mistakes_are_found_before_anything_is_loaded(settings_of, toy, quiet):
    for changes, problem in (
        ({"metric": "rouge"}, "no metric is called 'rouge'; there are: .*rouge_l"),
        ({"metric": "words"}, "words is neither better high nor low"),
        ({"path": "nowhere.jsonl"}, "^dev.path: there is no file nowhere.jsonl"),
    ):
        with pytest.raises(DpkdError, match=problem):
            dry_run(settings_of("kd", {"dev": rows_of(toy, **changes)}), console=quiet)


def test_directions():
    specs = metric_specs(load_registry({}))
    assert direction_of("rouge_l", specs) == direction_of("exact_match", specs) == 1
    assert direction_of("reverse_kl", specs) == direction_of("repetition", specs) == -1
