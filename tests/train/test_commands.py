"""The commands around a run: dry run, evaluation, sampling to a file, an interrupt from outside."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

import dpkd
from dpkd.api import SamplingSettings
from dpkd.data.settings import DataSettings
from dpkd.errors import DpkdError, SettingsError
from dpkd.models.settings import ModelSettings
from dpkd.plugins import load_registry
from dpkd.rollout.sample_file import sample_to_file
from dpkd.run_metrics import read_metrics
from dpkd.train import plan, run


@pytest.mark.parametrize("loss", ["sft", "dpkd", "minillm", "seqkd"])
def test_the_dry_run_loads_no_weights(loss, settings_of, console_text, monkeypatch):
    for place in ("dpkd.models.loading.load_model", "dpkd.models.in_memory.load_model"):
        monkeypatch.setattr(place, lambda *a, **k: pytest.fail("a dry run loads no weights"))
    console, text = console_text
    plan.dry_run(settings_of(loss), console=console)
    shown = text()
    for word in (loss, "steps", "memory", "MiB", "first example", "trained:"):
        assert word in shown
    assert ("student writes" in shown) == (loss in ("dpkd", "minillm"))
    assert ("teacher writes" in shown) == (loss in ("dpkd", "seqkd"))


@pytest.fixture
def console_text():
    from rich.console import Console

    console = Console(record=True, width=140, file=open(os.devnull, "w"))  # noqa: SIM115
    yield console, console.export_text
    console.file.close()


def test_a_teachers_file_is_continued_and_trained_on(settings_of, toy, quiet, tmp_path):
    output = tmp_path / "written.jsonl"
    data = DataSettings(path=str(toy / "data.jsonl"))
    model = ModelSettings(model=str(toy / "teacher"))
    sampling = SamplingSettings(max_new_tokens=6, batch_size=2)
    first = sample_to_file(model, data, sampling, registry=load_registry({}), output=output, seed=3)
    assert (first.written, first.found) == (24, 0)
    whole = output.read_text()
    output.write_text("".join(whole.splitlines(keepends=True)[:10]) + '{"torn')  # as an interrupt leaves it
    again = sample_to_file(model, data, sampling, registry=load_registry({}), output=output, seed=3)
    assert (again.written, again.found) == (14, 10)
    assert sorted(output.read_text().splitlines()) == sorted(whole.splitlines())
    with pytest.raises(DpkdError, match=r"written by another model, for other prompts or with other settings: seed \("):
        sample_to_file(model, data, sampling, registry=load_registry({}), output=output, seed=4)
    run.train(settings_of("sft", {"data.path": str(output), "data.on_bad_row": "skip"}), console=quiet)


def test_an_interrupt_from_outside_leaves_a_run_that_resumes(toy, tmp_path):
    args = [
        "train",
        "--loss",
        "rkl",
        "--teacher",
        str(toy / "teacher"),
        "--data",
        str(toy / "data.jsonl"),
        "--output",
        "run",
    ]
    for setting in (
        "student.init=layers",
        "student.layers=2",
        "train.steps=4000",
        "train.device=cpu",
        "train.log_every=1",
    ):
        args += ["--set", setting]
    command = [sys.executable, "-m", "dpkd.cli.main"]
    process = subprocess.Popen(
        [*command, *args], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    metrics = tmp_path / "run/metrics.jsonl"
    deadline = time.monotonic() + 90
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "stopping after this step" in errors
    done = read_metrics(metrics)[-1]["step"]
    assert 0 < done < 4000
    # Shorten the run on disk, so that continuing it is quick.
    config = tmp_path / "run/config.resolved.yaml"
    config.write_text(config.read_text().replace("steps: 4000", f"steps: {done + 2}"))
    finished = subprocess.run([*command, "train", "--resume", "run"], cwd=tmp_path, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert [line["step"] for line in read_metrics(metrics)] == list(range(1, done + 3))
    assert (tmp_path / "run/model/model.safetensors").is_file()


def test_python_is_the_shell(toy, tmp_path):
    settings = {"student.init": "layers", "student.layers": 2, "train.steps": 1, "train.device": "cpu"}
    folder = dpkd.train(
        loss="kd",
        teacher=str(toy / "teacher"),
        data=str(toy / "data.jsonl"),
        output=str(tmp_path / "run"),
        settings=settings,
    )
    result = dpkd.evaluate(str(folder.path), str(toy / "data.jsonl"), greedy=True, max_new_tokens=3)
    assert result.rows == 24
    with pytest.raises(
        SettingsError, match=r"train\.stepz: no such setting \(from settings\); did you mean train\.steps"
    ):
        dpkd.train(loss="kd", settings={"train.stepz": 1})
