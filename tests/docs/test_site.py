"""The navigation of the site, and its links. `make docs` builds it strictly."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import site_hooks
import yaml

PAGES = sorted(path.relative_to(site_hooks.DOCS).as_posix() for path in site_hooks.DOCS.rglob("*.md"))
MADE = {"reference/cli.md", "reference/settings.md", "reference/api.md"}  # by `make docs`
CONFIG = yaml.safe_load((site_hooks.DOCS.parent / "properdocs.yml").read_text(encoding="utf-8"))


def navigation() -> set[str]:
    config = SimpleNamespace(nav=yaml.safe_load((site_hooks.DOCS.parent / "properdocs.yml").read_text("utf-8"))["nav"])
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
    assert "properdocs build --strict\n" in recipe  # with --quiet it would count no warning, and so stop for none


@pytest.mark.parametrize("page", [page for page in PAGES if not page.startswith(("reference/", "adr/"))])
def test_links_of_a_page_lead_somewhere(page):
    text = (site_hooks.DOCS / page).read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.M))
    links = [link for link in links if link not in MADE]
    assert [link for link in links if not ((site_hooks.DOCS / page).parent / link).exists()] == []


def test_links_out_of_the_site_become_paths():
    page = SimpleNamespace(file=SimpleNamespace(src_path="hooks.md"))
    text = "[a](../dpkd/functional.py) [b](footguns.md) [c](adr/0003-checkpoints.md) [d](https://x.org) [e](gone.md)"
    assert site_hooks.on_page_markdown(text, page=page) == (
        "a (`dpkd/functional.py`) [b](footguns.md) c (`docs/adr/0003-checkpoints.md`) [d](https://x.org) [e](gone.md)"
    )


def test_figures_are_small_and_used():
    figures = sorted((site_hooks.DOCS / "figures").glob("*.png"))
    shown = ("concepts.md", "results.md", "theme/hero.html")
    pages = "".join((site_hooks.DOCS / page).read_text(encoding="utf-8") for page in shown)
    assert len(figures) >= 4
    for figure in figures:
        assert figure.stat().st_size < 100_000
        assert re.search(rf"""[("]figures/{figure.name}[)"]""", pages)


def test_formulas_become_mathml_with_the_parts_of_the_latex():
    page = SimpleNamespace(file=SimpleNamespace(src_path="losses/x.md"))
    html = site_hooks.on_page_markdown("a\n\n```math\n\\log\\Big(x\\Big), \\qquad y_t\n```\n\nb", page=page)
    assert html.startswith('a\n\n<div class="formula"><math')
    assert html.endswith("</math></div>\n\nb")
    assert html.count("<math") == 2  # one for each side of the \\qquad
    assert 'fence="true"' in html or "stretchy" in html  # brackets that grow
    assert "Big" not in html


@pytest.mark.parametrize("page", [page for page in PAGES if page.startswith("losses/")])
def test_the_formula_of_every_card_is_understood(page):
    text = (site_hooks.DOCS / page).read_text(encoding="utf-8")
    html = site_hooks.on_page_markdown(text, page=SimpleNamespace(file=SimpleNamespace(src_path=page)))
    formula = re.search(r'<div class="formula">(.*)</div>', html)
    assert formula
    assert "\\" not in re.sub(
        r"&#x0005C;", "\\\\", formula[1]
    )  # a command that the converter does not know stays as it is
    assert "<mi>text</mi>" not in formula[1]


def test_wide_tables_scroll_in_a_box():
    assert site_hooks.on_page_content("<p>a</p><table>b</table>") == '<p>a</p><div class="table"><table>b</table></div>'


def test_the_search_index_and_the_colors_of_code_are_written(tmp_path):
    (tmp_path / "search").mkdir()
    (tmp_path / "assets").mkdir()
    (tmp_path / "search/search_index.json").write_text('{"docs": [{"title": "a</script>"}]}', encoding="utf-8")
    site_hooks.on_post_build(SimpleNamespace(site_dir=tmp_path))
    assert (tmp_path / "assets/search.js").read_text(encoding="utf-8").startswith('const SEARCH = [{"title": ')
    colors = (tmp_path / "assets/code.css").read_text(encoding="utf-8")
    assert "prefers-color-scheme: dark" in colors
    assert ':root[data-theme="dark"] .highlight .k {' in colors


def test_the_theme_asks_nobody_else():
    files = [path for path in (site_hooks.DOCS / "theme").rglob("*") if path.is_file()]
    assert len(files) >= 4
    assert [path for path in files if "//" in path.read_text("utf-8").replace("// ", "")] == []
