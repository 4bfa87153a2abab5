"""The navigation of the site, and its links. `make docs` builds it strictly."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import site_hooks
import yaml

PAGES = sorted(path.relative_to(site_hooks.DOCS).as_posix() for path in site_hooks.DOCS.rglob("*.md"))
MADE = {"reference/cli.md", "reference/settings.md", "reference/api.md"}  # by `make docs`
CONFIG = yaml.safe_load((site_hooks.DOCS.parent / "mkdocs.yml").read_text(encoding="utf-8"))


def navigation() -> set[str]:
    config = SimpleNamespace(nav=yaml.safe_load((site_hooks.DOCS.parent / "mkdocs.yml").read_text("utf-8"))["nav"])
    return set(site_hooks._paths(site_hooks.on_config(config).nav))


def test_every_page_is_in_the_navigation():
    there = {page for page in PAGES if not page.startswith(("adr/", "reference/"))}
    assert len(there) > 30
    assert navigation() - MADE == there
    assert navigation() >= MADE


def test_the_build_is_strict():
    assert CONFIG["strict"] is True
    assert set(CONFIG["validation"]["links"].values()) == {"warn"}
    recipe = (site_hooks.DOCS.parent / "Makefile").read_text(encoding="utf-8")
    assert "mkdocs build --strict\n" in recipe  # with --quiet it would count no warning, and so stop for none


@pytest.mark.parametrize("page", [page for page in PAGES if not page.startswith(("reference/", "adr/"))])
def test_links_of_a_page_lead_somewhere(page):
    text = (site_hooks.DOCS / page).read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.M))
    links = [link for link in links if link not in MADE]
    assert [link for link in links if not ((site_hooks.DOCS / page).parent / link).exists()] == []


def test_links_out_of_the_site_become_paths():
    page = SimpleNamespace(file=SimpleNamespace(src_path="hooks.md"))
    text = "[a](../dpkd/api.py) [b](footguns.md) [c](adr/0003-checkpoints.md) [d](https://x.org) [e](gone.md)"
    assert site_hooks.on_page_markdown(text, page=page) == (
        "a (`dpkd/api.py`) [b](footguns.md) c (`docs/adr/0003-checkpoints.md`) [d](https://x.org) [e](gone.md)"
    )


def test_figures_are_small_and_used():
    figures = sorted((site_hooks.DOCS / "figures").glob("*.png"))
    pages = "".join((site_hooks.DOCS / page).read_text(encoding="utf-8") for page in ("concepts.md", "results.md"))
    assert len(figures) == 4
    for figure in figures:
        assert figure.stat().st_size < 100_000
        assert f"](figures/{figure.name})" in pages
