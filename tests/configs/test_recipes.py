"""Every recipe is valid against the installed losses, and says what it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from dpkd.config.layers import file_layer
from dpkd.config.resolve import resolve
from dpkd.plugins import load_registry
from dpkd.train.sweep import read_sweep

FOLDER = Path(__file__).parents[2] / "configs"
SWEEPS = sorted((FOLDER / "sweeps").glob("*.yaml"))
RECIPES = sorted(set(FOLDER.rglob("*.yaml")) - set(SWEEPS))


def test_there_are_recipes():
    assert len(RECIPES) >= 5
    assert len(SWEEPS) >= 4


@pytest.mark.parametrize("path", SWEEPS, ids=lambda p: p.stem)
def test_a_sweep_is_valid_and_explained(path):
    plan = read_sweep(path)
    assert len(plan.runs) > 5
    head = path.read_text(encoding="utf-8").split("\noutput:")[0]
    assert f"# Run: dpkd sweep configs/sweeps/{path.name}" in head
    assert "Needs" in head


def test_the_small_sweep_has_the_settings_of_the_small_recipes():
    plan = read_sweep(FOLDER / "sweeps" / "small.yaml")
    small = {path.stem: dict(_leaves(file_layer(path).values)) for path in (FOLDER / "small").glob("*.yaml")}
    assert len(plan.runs) == len(small)
    for run in plan.runs:
        name = "start" if run.name == "start" else run.settings["loss.name"]
        common = {path: value for path, value in small[name].items() if path in run.settings}
        assert len(common) > 8
        # Where the student is, each names in its own way; text by others is limited for all runs of the sweep.
        differ = {path for path, value in common.items() if run.settings[path] != value} - {"student.model"}
        assert not differ, (run.name, differ)


def _leaves(values, path=""):
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_a_recipe_is_valid_and_explained(path):
    resolve([file_layer(path)], load_registry())
    head = path.read_text(encoding="utf-8").split("\nloss:")[0]
    assert head.startswith("# ")
    assert f"# Run: dpkd train --config configs/{path.relative_to(FOLDER)}" in head
    assert "Needs" in head


def test_every_row_of_the_papers_is_on_the_page():
    page = (FOLDER.parent / "docs/reproduce.md").read_text(encoding="utf-8")
    rows = [path for path in RECIPES if path.parent.name == "paper"]
    assert len(rows) == page.count("\n| ") - 1
    for path in rows:
        head = path.read_text(encoding="utf-8").splitlines()
        published = head[1].removeprefix("# Published: ").removesuffix(".")
        assert f"| `{path.stem}` | {published} |" in page
