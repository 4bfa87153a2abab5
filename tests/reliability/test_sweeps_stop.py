"""A sweep that is stopped takes its run with it; one that was changed says so."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml
from toy_commands import write_toy
from toy_runs import torchrun

from dpkd.train import checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Toy models, data, and a sweep of one long run."""
    folder = tmp_path_factory.mktemp("sweep")
    write_toy(folder / "toy")
    write_sweep(folder, 1_000_000)
    return folder


def write_sweep(folder: Path, steps: int, lr: float = 1e-3) -> None:
    settings = {
        "output": "runs",
        "settings": {"teacher.model": "toy/model", "data.path": "toy/data.jsonl", "train.steps": steps, "train.lr": lr},
        "stages": {"one": {"settings": {"loss.name": "kd", "student.init": "layers", "student.layers": 1}}},
    }
    (folder / "sweep.yaml").write_text(yaml.safe_dump(settings))


def start(folder: Path, *options: str) -> subprocess.Popen:
    command = [sys.executable, "-P", "-m", "dpkd.cli.main", "sweep", "sweep.yaml", *options]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def child_of(parent: int, does: bytes = b"train") -> int:
    """The process that a sweep started, by a word of its command."""
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                status = (entry / "stat").read_text().rpartition(")")[2].split()
                found = does in (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if int(status[1]) == parent and found:
                return int(entry.name)
        time.sleep(0.05)
    raise AssertionError("no run was started")


def is_alive(process: int) -> bool:
    try:
        return (Path("/proc") / str(process) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def ends(process: int, seconds: float = 200) -> bool:
    return _until(lambda: not is_alive(process), seconds)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_launcher_that_is_interrupted_takes_its_processes_with_it(tmp_path):
    """What the tests with several processes rely on, when they are interrupted."""
    program = tmp_path / "program.py"
    program.write_text("import os, pathlib, time\npathlib.Path(str(os.getpid())).touch()\ntime.sleep(600)\n")
    (tmp_path / "here").mkdir()

    def interrupt(number, frame):
        raise KeyboardInterrupt

    def both_run() -> bool:
        return len(list((tmp_path / "here").iterdir())) == 2

    before = signal.signal(signal.SIGALRM, interrupt)
    waiting = threading.Thread(target=lambda: _until(both_run) and os.kill(os.getpid(), signal.SIGALRM))
    waiting.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            torchrun(str(program), port=30600 + os.getpid() % 400, cwd=tmp_path / "here")
    finally:
        waiting.join()
        signal.signal(signal.SIGALRM, before)
    started = [int(file.name) for file in (tmp_path / "here").iterdir()]
    assert len(started) == 2
    assert all(ends(process, 20) for process in started)


def _until(condition, seconds: float = 200) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("number", "options", "word"),
    [
        (signal.SIGHUP, ["--isolate"], b"train"),  # SIGTERM: below
        (signal.SIGKILL, ["--isolate"], b"train"),
        (signal.SIGINT, ["--devices", "0"], b"sweep_worker"),
        (signal.SIGTERM, ["--devices", "0"], b"sweep_worker"),
        (signal.SIGKILL, ["--devices", "0"], b"sweep_worker"),
    ],
)
def test_a_sweep_that_is_stopped_takes_its_run_with_it(number, options, word, folder):
    sweep = start(folder, *options)
    run = child_of(sweep.pid, word)
    metrics = folder / "runs/one/metrics.jsonl"
    size = metrics.stat().st_size if metrics.exists() else 0
    deadline = time.monotonic() + 200
    while (metrics.stat().st_size if metrics.exists() else 0) <= size and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(sweep.pid, number)
    said, _ = sweep.communicate(timeout=200)
    assert ends(run)
    assert sweep.returncode == (-9 if number == signal.SIGKILL else 128 + number), said
    if number != signal.SIGKILL:
        assert "the sweep stopped after 0 of 1 runs; call it again to go on" in said
    assert checkpoint.latest(folder / "runs/one/checkpoints") is not None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_sweep_in_one_process_stops_with_a_checkpoint(number, tmp_path):
    write_toy(tmp_path / "toy")
    write_sweep(tmp_path, 1_000_000)
    sweep = start(tmp_path)
    metrics = tmp_path / "runs/one/metrics.jsonl"
    deadline = time.monotonic() + 200
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(sweep.pid, number)
    said, _ = sweep.communicate(timeout=200)
    assert sweep.returncode == 128 + number, said
    assert "the sweep stopped after 0 of 1 runs; call it again to go on" in said
    assert checkpoint.latest(tmp_path / "runs/one/checkpoints") is not None


def test_settings_that_changed_are_refused_by_name(tmp_path):
    write_toy(tmp_path / "toy")
    write_sweep(tmp_path, 1)
    first = start(tmp_path)
    said, _ = first.communicate(timeout=300)
    assert first.returncode == 0, said
    write_sweep(tmp_path, 1, lr=0.05)
    second = start(tmp_path)
    said, _ = second.communicate(timeout=300)
    assert second.returncode == 1
    assert "holds a run with other settings: train.lr is 0.001 there and 0.05 here" in " ".join(said.split())
