"""`describe-loss --compare A B`: both losses' cards and settings, differences marked."""

from __future__ import annotations

import json
from itertools import combinations
from typing import Any

import pytest
from rich.cells import cell_len
from typer.testing import CliRunner

from dpkd.api import LossSpec
from dpkd.cli.main import app
from dpkd.errors import DpkdError, SettingsError
from dpkd.plugins import load_registry


def call(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["describe-loss", *arguments], env={"COLUMNS": "160"})


def rows(first: str, second: str) -> dict[str, dict[str, Any]]:
    found = json.loads(call("--compare", first, second, "--json").stdout)
    assert found["losses"] == [first, second]
    return {row["what"]: row for row in found["rows"]}


@pytest.mark.parametrize(("first", "second"), list(combinations(["sft", "kd", "dpkd", "minillm"], 2)))
def test_every_setting_and_default_of_both_is_there(first, second):
    found = rows(first, second)
    for side, name in (("first", first), ("second", second)):
        fields = load_registry().get(LossSpec, name).spec.config.model_fields
        told = {what: row[side] for what, row in found.items() if what.startswith("loss.") and row[side] != "—"}
        assert told.keys() == {f"loss.{field}" for field in fields}
        for field, info in fields.items():
            default = {None: "none", True: "true", False: "false"}.get(info.default, str(info.default))
            if info.default in (0, 1) and not isinstance(info.default, bool):
                default = str(info.default)
            assert told[f"loss.{field}"].splitlines()[0] == default


def test_what_is_the_same_and_what_is_not():
    found = rows("dpkd", "dpkd-simpo")
    assert found["family"] == {"what": "family", "first": "pair", "second": "pair", "same": True}
    for aspect in ("formula", "needs of the teacher", "reads", "loss.beta", "loss.gamma", "loss.aggregation"):
        assert not found[aspect]["same"]
    assert found["loss.gamma"]["first"] == "—"
    assert all(row["same"] for row in rows("kd", "kd").values())


def test_on_the_terminal_differences_are_marked():
    output = call("--compare", "dpkd", "dpkd-simpo").stdout
    lines = {line[4:22].strip(): line[:3].strip() for line in output.splitlines()}
    assert lines["formula"] == "≠"
    assert lines["family"] == ""
    assert "-log σ(β/|yₜ|·log q(yₜ)" in output
    different = sum(not row["same"] for row in rows("dpkd", "dpkd-simpo").values())
    assert f"{different} of {len(rows('dpkd', 'dpkd-simpo'))} differ" in output


def test_a_narrow_terminal_breaks_no_formula_and_no_link():
    output = CliRunner().invoke(app, ["describe-loss", "--compare", "dpkd", "dpkd-simpo"], env={"COLUMNS": "80"}).stdout
    assert "σ(β/|yₜ|·log(q(yₜ)/p(yₜ))" in output
    assert "arXiv 2406.19774" in output
    assert "https" not in output
    assert all(cell_len(line) <= 80 for line in output.splitlines())


@pytest.mark.parametrize("arguments", [(), ("kd", "--compare", "kd", "rkl")])
def test_one_loss_or_two(arguments):
    error = call(*arguments).exception
    assert isinstance(error, SettingsError)
    assert str(error) == "name one loss, or two with --compare A B"


def test_an_unknown_name():
    error = call("--compare", "kd", "rkll").exception
    assert isinstance(error, DpkdError)
    assert "did you mean rkl" in str(error)
