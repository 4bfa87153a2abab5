"""Every recipe is valid against the installed losses, and says what it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from dpkd.config.layers import file_layer
from dpkd.config.resolve import resolve
from dpkd.host import load_host

FOLDER = Path(__file__).parents[2] / "configs"
RECIPES = sorted(FOLDER.rglob("*.yaml"))


def test_there_are_recipes():
    assert len(RECIPES) >= 5


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_a_recipe_is_valid_and_explained(path):
    resolve([file_layer(path)], load_host())
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
