"""Trackers: TensorBoard and trackio for real, wandb and failures through stand-ins that note every call."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from dpkd.errors import DpkdError
from dpkd.train.trackers import Trackers

CONFIG = {"train": {"lr": 0.1}}


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str) -> list[tuple[str, Any]]:
    """A module with `init`, whose run notes its calls."""
    calls: list[tuple[str, Any]] = []

    def init(**options: Any) -> SimpleNamespace:
        calls.append(("init", options))
        return SimpleNamespace(
            id="id-1",
            name=f"{options['name']}-given",
            log=lambda metrics, step: calls.append(("log", (step, metrics))),
            finish=lambda: calls.append(("finish", None)),
        )

    module = ModuleType(name)
    module.init = init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, name, module)
    return calls


def test_tensorboard_has_the_scalars(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trackers = Trackers(["tensorboard"], tmp_path, "run", CONFIG)
    for step, value in ((1, 0.5), (10, float("inf"))):
        trackers.log(step, {"loss/main": value, "lr": 0.25})
    trackers.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == ["loss/main", "lr"]
    assert [(e.step, e.value) for e in events.Scalars("loss/main")] == [(1, 0.5), (10, float("inf"))]
    text = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert '"lr": 0.1' in text
    assert '"run": "run"' in text


@pytest.mark.parametrize(
    ("name", "first", "again"),
    [
        ("wandb", {"name": "run", "id": None}, {"name": "run", "id": "id-1"}),
        ("trackio", {"name": "run"}, {"name": "run-given"}),
    ],
)
def test_each_step_arrives_and_a_resumed_run_continues(
    name: str, first: dict[str, Any], again: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = stand_in(monkeypatch, name)
    trackers = Trackers([name], tmp_path, "run", CONFIG)
    trackers.log(5, {"a": 1.0})
    trackers.close()
    trackers.close()
    Trackers([name], tmp_path, "run", CONFIG)
    common = {"project": "dpkd", "config": CONFIG, **({"dir": str(tmp_path)} if name == "wandb" else {})}
    assert calls == [
        ("init", {**common, **first, "resume": "never"}),
        ("log", (5, {"a": 1.0})),
        ("finish", None),
        ("init", {**common, **again, "resume": "allow"}),
    ]


def test_the_real_trackio_keeps_one_run_over_an_interruption(tmp_path: Path) -> None:
    """In a process of its own, for trackio reads where its files lie when it is imported."""
    code = """
import sys
from pathlib import Path
from dpkd.train.trackers import Trackers
for step in (1, 2):
    trackers = Trackers(["trackio"], Path("run"), "run", {"lr": 0.1})
    trackers.log(step, {"loss": 1.0 / step})
    trackers.close()
"""
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio"), "PYTHONWARNINGS": "ignore"}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True, capture_output=True)
    with closing(sqlite3.connect(tmp_path / "trackio" / "dpkd.db")) as database:
        rows = database.execute("select run_name, step, metrics from metrics order by step").fetchall()
    assert {name for name, _, _ in rows} == {(tmp_path / "run" / "trackio.id").read_text().strip()}
    assert {step: json.loads(metrics).get("loss") for _, step, metrics in rows} == {1: 1.0, 2: 0.5}


def test_without_names_nothing_happens(tmp_path: Path) -> None:
    trackers = Trackers([], tmp_path, "run", CONFIG)
    trackers.log(1, {"a": 1.0})
    trackers.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_missing_package_says_what_to_install(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(DpkdError, match=rf"asks for {name}.*pip install {name}`"):
        Trackers([name], tmp_path, "run", CONFIG)
    assert list(tmp_path.iterdir()) == []


def test_when_one_fails_those_before_it_are_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = stand_in(monkeypatch, "wandb")
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(DpkdError, match="trackio"):
        Trackers(["wandb", "trackio"], tmp_path, "run", CONFIG)
    assert calls[-1] == ("finish", None)
