"""What is read of run folders, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from report_folders import add_scores, make_run

from dpkd.errors import DpkdError
from dpkd.report.reading import Cost, read_run, read_runs
from dpkd.report.sections import facts_of


def test_a_run(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "kd-1", "kd"))
    assert (run.name, run.loss, len(run.metrics), len(run.samples)) == ("kd-1", "kd", 3, 1)
    assert run.cost == Cost(seconds=6.0, tokens=600.0, peak_memory_mib=503.0)
    assert facts_of(run)["student"] == "3 layers of the teacher (169K)"
    assert facts_of(run)["teacher"] == "big (260K)"


def test_sources_of_values_are_read_from_the_comments(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "a"))
    assert run.sources == {
        "loss.name": "--loss",
        "teacher.model": "--teacher",
        "student.init": "--set",
        "student.layers": "--set",
        "data.path": "--data",
    }
    assert run.config["data"]["template"] == "two  # signs"


def test_a_folder_of_evaluations_is_a_run_without_training(tmp_path: Path) -> None:
    add_scores(tmp_path / "gpt2", {10: [1.0, 2.0]})
    run = read_run(tmp_path / "gpt2")
    assert (run.loss, run.cost, list(run.evaluations)) == (None, Cost(), ["dolly"])
    assert [row["scores"]["rouge_l"] for row in run.evaluations["dolly"].predictions()[10]] == [1.0, 2.0]


def test_one_evaluation_alone_is_a_run_without_training(tmp_path: Path) -> None:
    add_scores(tmp_path / "gpt2", {10: [1.0, 2.0]})
    (run,) = read_runs([tmp_path / "gpt2" / "dolly"])
    assert (run.name, list(run.evaluations)) == ("dolly", ["dolly"])
    assert [row["scores"]["rouge_l"] for row in run.evaluations["dolly"].predictions()[10]] == [1.0, 2.0]


def test_a_torn_last_line_is_left_out_and_another_is_not(tmp_path: Path) -> None:
    path = make_run(tmp_path / "a")
    with (path / "samples.jsonl").open("a") as file:
        file.write('{"step": 2, "pro')
    assert len(read_run(path).samples) == 1
    with (path / "samples.jsonl").open("a") as file:
        file.write('\n{"step": 3}\n')
    with pytest.raises(DpkdError, match=r"samples\.jsonl:2"):
        read_run(path)


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DpkdError, match="neither a run folder"):
        read_run(tmp_path)
    path = make_run(tmp_path / "a")
    with pytest.raises(DpkdError, match="named twice"):
        read_runs([path, path / ".." / "a"])
    (path / "run.json").write_text("{")
    with pytest.raises(DpkdError, match=r"run\.json: expected JSON"):
        read_run(path)


def test_runs_of_one_name_are_told_apart_by_their_paths(tmp_path: Path) -> None:
    paths = [make_run(tmp_path / side / "kd") for side in ("one", "two")]
    assert [run.name for run in read_runs(paths)] == [str(path) for path in paths]
