"""The log of metrics survives a death at any byte, and a resumed run continues it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, cast

import pytest

from dpkd.api import Training
from dpkd.errors import DpkdError
from dpkd.run_metrics import read_metrics
from dpkd.train.logs import MetricsLog


def written(log: MetricsLog, step: int, line: dict[str, Any]) -> None:
    log.on_log(cast("Training", None), step, line)


def steps(path: Path) -> list[int]:
    return [row["step"] for row in read_metrics(path)]


def test_what_is_logged_is_read_at_once(tmp_path: Path) -> None:
    path = tmp_path / "new" / "metrics.jsonl"
    log = MetricsLog(path)
    written(log, 1, {"loss/main": 0.5, "text": {"truncated": 2}, "note": "né"})
    assert read_metrics(path) == [{"step": 1, "loss/main": 0.5, "text": {"truncated": 2}, "note": "né"}]
    written(log, 2, {})
    assert steps(path) == [1, 2]


def test_numbers_that_are_not_finite_stay_numbers_and_strict_json(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    written(MetricsLog(path), 1, {"a": math.nan, "b": [math.inf], "c": {"d": -math.inf}})

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    json.loads(path.read_text(), parse_constant=refuse)
    (row,) = read_metrics(path)
    assert math.isnan(row["a"])
    assert (row["b"], row["c"]) == ([math.inf], {"d": -math.inf})


def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for damage in ("{", "[]", '{"loss": 1}', '{"step": "1"}'):
        path.write_text(f'{{"step": 1}}\n{damage}\n{{"step": 3}}\n')
        with pytest.raises(DpkdError, match=r"metrics\.jsonl:2: expected one JSON object"):
            read_metrics(path)


def test_a_log_that_is_absent_is_named(tmp_path: Path) -> None:
    with pytest.raises(DpkdError, match="absent: the metrics of a run cannot be read"):
        read_metrics(tmp_path / "absent")


def test_a_resumed_run_drops_what_it_will_write_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    for step in (1, 2, 3, 4):
        written(log, step, {"x": step / 3})
    before = path.read_bytes().split(b"\n")
    log.on_start(cast("Training", None), 2)
    assert path.read_bytes().split(b"\n") == [*before[:2], b""]
    written(log, 3, {})
    assert steps(path) == [1, 2, 3]
    log.on_start(cast("Training", None), 0)
    assert read_metrics(path) == []
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]
