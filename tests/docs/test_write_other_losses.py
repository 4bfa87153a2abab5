"""The pages on pair losses, rollout losses and presets: blocks are what `dpkd new-loss` writes, edits work."""

from __future__ import annotations

import re
import runpy
import shlex
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
from typer.main import get_command

from dpkd.cli.main import app
from dpkd.scaffold import names_of, rendered, write_package
from dpkd.testing import NonConforming, Outcome, check_loss

ROOT = Path(__file__).parents[2]
SCRIPT = runpy.run_path(str(ROOT / "benchmarks/ten_minutes.py"))
NAMES = names_of("hello", {})
KINDS = ("pair", "rollout")
PAGES = {
    kind: (ROOT / f"docs/write-a-{kind}.md").read_text(encoding="utf-8")
    for kind in ("pair-loss", "rollout-loss", "preset")
}


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGES[page], flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("kind", KINDS)
def test_every_python_block_is_a_piece_of_what_new_loss_writes(kind):
    files = rendered(NAMES, kind).values()
    pieces = blocks(f"{kind}-loss", "python")
    assert len(pieces) >= 3
    assert [piece for piece in pieces if not any(piece in text for text in files)] == []


@pytest.mark.parametrize("page", ["pair-loss", "rollout-loss"])
def test_every_command_and_flag_exists(page):
    lines = [shlex.split(line, comments=True) for line in "".join(blocks(page, "bash")).splitlines()]
    commands = [words for words in lines if words[0] == "dpkd"]
    assert len(commands) >= 4
    for words in commands:
        flags = {name for parameter in get_command(app).commands[words[1]].params for name in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= flags


@pytest.fixture
def package(tmp_path, monkeypatch):
    """`package(kind, edits)`: the loss's module and its test, after so many of the page's edits."""

    def made(kind: str, edits: list[str]) -> tuple[ModuleType, ModuleType]:
        folder = tmp_path / f"{kind}-{len(edits)}"
        write_package(NAMES, kind, folder)
        for edit in edits:
            SCRIPT["apply"](edit, folder)
        monkeypatch.syspath_prepend(folder)
        for name in (NAMES.module, NAMES.test):
            sys.modules.pop(name, None)
        return import_module(NAMES.module), import_module(NAMES.test)

    yield made
    for name in (NAMES.module, NAMES.test):
        sys.modules.pop(name, None)


def failures(loss: ModuleType, test: ModuleType) -> set[str]:
    try:
        check_loss(loss.SPEC, reference=test.reference)
    except NonConforming as error:
        return set(error.report.named(Outcome.FAILED))
    return set()


def test_the_edits_of_the_pair_page(package):
    edits = blocks("pair-loss", "diff")
    assert len(edits) == 9
    assert failures(*package("pair", [])) == set()
    assert failures(*package("pair", edits[:2])) == {"matches_reference"}  # the test asks for what is not there yet
    assert "only_declared_signals" in failures(*package("pair", edits[:4]))  # `reads` lacks the lengths
    assert failures(*package("pair", edits[:5])) == set()
    assert "only_declared_signals" in failures(*package("pair", edits[:8]))  # `reads` has the sums
    loss, test = package("pair", edits)
    assert failures(loss, test) == set()
    assert set(loss.SPEC.config.model_fields) == {"beta", "gamma"}


def test_the_edits_of_the_rollout_page(package):
    edits = blocks("rollout-loss", "diff")
    assert len(edits) == 4
    _, test = package("rollout", [])
    test.test_what_each_token_is_worth()
    _, test = package("rollout", edits[:1])
    with pytest.raises(ValueError, match="reward_clip"):  # there is no such setting yet
        test.test_what_each_token_is_worth()
    _, test = package("rollout", edits[:2])
    with pytest.raises(AssertionError):
        test.test_what_each_token_is_worth()
    loss, test = package("rollout", edits)
    test.test_what_each_token_is_worth()
    assert failures(loss, test) == set()


def test_the_preset_of_the_page_works():
    (block,) = blocks("preset", "python")
    names: dict[str, object] = {}
    exec(block, names)
    (spec,) = names["dpkd_losses"]()  # type: ignore[operator]
    assert (spec.preset_of, spec.config().beta) == ("jsd", 0.1)
    assert check_loss(spec).ok
