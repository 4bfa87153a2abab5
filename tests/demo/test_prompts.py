"""The prompts that the project ships: enough, varied, and held out for real."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from rich.console import Console

from dpkd.demo.run import PROMPTS, SETTINGS, run_demo
from dpkd.errors import DpkdError

ROWS = [json.loads(line) for line in PROMPTS.read_text(encoding="utf-8").splitlines()]


def test_enough_and_varied():
    splits = Counter(row["split"] for row in ROWS)
    assert splits["train"] >= 200
    assert splits["heldout"] >= 40
    assert len(Counter(row["category"] for row in ROWS)) >= 10
    assert all(row["instruction"].strip() and row["output"].strip() for row in ROWS)


def test_nothing_twice_and_nothing_held_out_is_trained_on():
    def words(row):
        return frozenset((row["instruction"] + " " + row["input"]).lower().split())

    assert len({row["id"] for row in ROWS}) == len(ROWS)
    assert len({words(row) for row in ROWS}) == len(ROWS)
    trained = [words(row) for row in ROWS if row["split"] == "train"]
    for row in ROWS:
        if row["split"] == "heldout":
            own = words(row)
            assert max(len(own & other) / len(own | other) for other in trained) < 0.8, row["id"]


def test_a_misspelt_loss_is_said_before_anything_slow(monkeypatch):
    monkeypatch.setattr("dpkd.demo.run.bundled_teacher", lambda cache: pytest.fail("too late"))
    with pytest.raises(DpkdError, match="no loss is called 'kdd'"):
        run_demo("kdd", console=Console(quiet=True))


def test_the_settings_are_settings():
    from dpkd.config.layers import Layer
    from dpkd.config.resolve import resolve
    from dpkd.plugins import load_registry

    files = {"teacher": "teacher", "data": {**SETTINGS["data"], "path": "data.jsonl"}, "loss": {"name": "kd"}}
    settings = resolve([Layer("the demo", {**SETTINGS, **files})], load_registry()).settings
    assert settings.train.batch_size == SETTINGS["train"]["batch_size"]
