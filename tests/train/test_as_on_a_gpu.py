"""Whole runs on a CPU by the ways that only a GPU takes: packed rows, fused layers, heads with further rows.

Each changes how numbers are computed, and none of them which: a run ends where it ends without them.
"""

from __future__ import annotations

import json

import pytest
from toy_runs import assert_same_weights

from dpkd.models import fused_layers, head
from dpkd.train import run

RUNS = {
    "kd": {},
    "jsd": {"text.source": "student"},
    "dpkd": {},
    "minillm": {},
    "akl": {},
    "dpo": {},
    "rkl": {"student.gradient_checkpointing": True},
}


@pytest.mark.parametrize(("loss", "precision"), [*((loss, "fp32") for loss in RUNS), ("kd", "bf16"), ("dpkd", "bf16")])
def test_a_run_ends_where_it_ends_without_them(loss, precision, settings_of, quiet, tmp_path, monkeypatch):
    def end(name, packing):
        changes = {"batch.packing": packing, "train.optimizer": "sgd", "train.lr": 0.05, "train.precision": precision}
        resolved = settings_of(loss, changes | RUNS[loss] | {"output": str(tmp_path / name)})
        folder = run.train(resolved, console=quiet)
        facts = json.loads((tmp_path / name / "run.json").read_text(encoding="utf-8"))
        assert facts["layouts"][0]["packed"] == (packing == "on")
        return folder.model / "model.safetensors"

    expected = end("plain", "off")
    monkeypatch.setattr(head, "ALIGNED_ON", ("cpu",))
    monkeypatch.setattr(fused_layers, "FUSED_ON", ("cpu",))
    found = end("gpu", "on")
    if precision == "fp32":  # else they differ by its rounding: that it runs is what can be said
        assert_same_weights(expected, found)
