"""`list-losses`, `describe-loss` and `config schema` on installed and on made-up plugins."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from rich.cells import cell_len
from typer.testing import CliRunner

from dpkd.api import Text
from dpkd.cli.main import app
from dpkd.errors import DpkdError, SettingsError
from dpkd.plugins import load_registry

LossSource = Callable[[str], str]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    def run(*arguments: str, plugins: str | None = None, width: int = 80) -> Any:
        if plugins is not None:
            monkeypatch.setenv("DPKD_PLUGINS", plugins)
        return CliRunner().invoke(app, list(arguments), env={"COLUMNS": str(width)})

    return run


@pytest.mark.parametrize("width", [80, 140])
def test_every_loss_has_a_line_of_the_table(call: Callable[..., Any], width: int) -> None:
    names = list(load_registry().losses)
    assert names
    lines = call("list-losses", width=width).stdout.splitlines()
    assert [line.split()[0] for line in lines if line[:1] == " " and line[1:2].isalnum()][1:] == names
    assert all(len(line) <= width for line in lines)
    (said,) = [line for line in lines if line.startswith("not confirmed against the paper")]
    assert said.endswith(": " + ", ".join(n for n, one in load_registry().losses.items() if one.spec.card.unconfirmed))


@pytest.mark.parametrize("width", [80, 120])
def test_nothing_of_the_table_is_cut(call: Callable[..., Any], width: int) -> None:
    said = call("list-losses", width=width).stdout
    assert "…" not in said
    assert len(said.splitlines()) < (70 if width == 80 else 180)


def test_json_says_what_the_specs_say(call: Callable[..., Any]) -> None:
    rows = {row["name"]: row for row in json.loads(call("list-losses", "--json").stdout)}
    losses = load_registry().losses
    assert rows.keys() == losses.keys()
    for name, row in rows.items():
        spec = losses[name].spec
        assert (row["family"], {Text(text) for text in row["text"]}) == (spec.family, spec.accepts)


def test_filters(call: Callable[..., Any]) -> None:
    def names(*arguments: str) -> set[str]:
        return {row["name"] for row in json.loads(call("list-losses", "--json", *arguments).stdout)}

    everything = names()
    assert names("--offers", "hidden-states") == everything
    assert names("--offers", "logits") == everything - {"hidden-mse", "hidden-cosine"}
    assert names("--offers", "text") < names("--offers", "token-logps") < everything
    assert {"sft", "seqkd"} <= names("--offers", "text")
    assert "kd" not in names("--offers", "token-logps")
    chosen = names("--offers", "chosen-ids") - names("--offers", "top-k")
    assert chosen == {"topk-rkl", "topk-rkl-sampled", "topk-jsd"}
    families = [names("--family", family) for family in ("token", "pair", "rollout")]
    assert set.union(*families) == everything
    assert sum(map(len, families)) == len(everything)


@pytest.mark.parametrize("arguments", [["--family", "pairs"], ["--offers", "logit"]])
def test_a_filter_that_does_not_exist(arguments: list[str], call: Callable[..., Any]) -> None:
    error = call("list-losses", *arguments).exception
    assert isinstance(error, SettingsError)
    assert str(error).startswith(f"{arguments[0]} {arguments[1]}: should be ")


def test_broken_plugins_are_listed_with_reasons(
    call: Callable[..., Any], install_plugin: Any, loss_source: LossSource
) -> None:
    install_plugin("stranger", {"curved": loss_source("curved"), "flat": "import nowhere_at_all"})
    listed = call("list-losses", plugins="stranger")
    assert listed.exit_code == 0
    assert "curved" in listed.stdout
    assert "1 plugin(s) could not be loaded: dpkd list-losses --broken" in listed.stderr
    assert "DPKD_PLUGINS='stranger' restricts the plugins" in listed.stderr
    reason = "ModuleNotFoundError: No module named 'nowhere_at_all'"
    assert call("list-losses", "--broken").stdout == f"flat (stranger): {reason}\n"
    (row,) = json.loads(call("list-losses", "--broken", "--json").stdout)
    assert row == {"entry_point": "flat", "distribution": "stranger", "reason": reason}


def test_no_plugin_is_broken_here(call: Callable[..., Any]) -> None:
    assert call("list-losses", "--broken").stdout == "every plugin loaded\n"


def test_two_losses_of_one_name_are_an_error_that_hides_no_other(
    call: Callable[..., Any], install_plugin: Any, loss_source: LossSource
) -> None:
    install_plugin("stranger", {"curved": loss_source("curved"), "straight": loss_source("straight")})
    install_plugin("guest", {"curved": loss_source("curved")})
    listed = call("list-losses", plugins="stranger,guest")
    assert "straight" in listed.stdout
    error = listed.exception
    assert isinstance(error, DpkdError)
    assert "stranger 1.0" in str(error)
    assert "guest 1.0" in str(error)
    assert call("--help").exit_code == 0
    assert "two losses are called 'curved'" in call("list-losses", "--broken").stdout


@pytest.mark.parametrize("name", list(load_registry({}).losses))
def test_a_card_is_told_whole(name: str, call: Callable[..., Any]) -> None:
    spec = load_registry({}).losses[name].spec
    printed = call("describe-loss", name, width=80).stdout
    words = " ".join(printed.split())
    assert all(cell_len(line) <= 80 for line in printed.splitlines())
    for text in (spec.card.title, spec.card.summary, *spec.card.use_when.split(), *spec.card.avoid_when.split()):
        assert text in words
    for setting in spec.config.model_fields:
        assert setting in words
    found = json.loads(call("describe-loss", name, "--json").stdout)
    assert found["settings"]["properties"].keys() == spec.config.model_fields.keys()
    assert found["card"]["formula"] == spec.card.formula


def test_defaults_are_shown_as_they_are(call: Callable[..., Any]) -> None:
    lines = call("describe-loss", "kd", width=140).stdout.splitlines()
    rows = [line.split() for line in lines]
    fields = load_registry().losses["kd"].spec.config.model_fields
    shown = {row[0]: row[1] for row in rows if row[0:1] and row[0] in fields}
    assert (shown["kd_ratio"], shown["temperature"], shown["scale_by_t2"]) == ("0.5", "1.0", "false")


def test_schema_of_one_loss(call: Callable[..., Any]) -> None:
    found = json.loads(call("config", "schema", "--loss", "kd").stdout)
    assert "kd_ratio" in json.dumps(found["properties"]["loss"])
    assert "loss" not in json.loads(call("config", "schema").stdout)["properties"]
