"""Hooks of the documentation site: navigation, links that leave the site, formulas, colors of code, search index."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
MATHML = (
    (re.compile(r"\\[Bb]ig(?=[(\[])"), r"\\left"),
    (re.compile(r"\\[Bb]ig(?=[)\]])"), r"\\right"),
    (re.compile(r"\\[Bb]ig(?=\\?\|)"), ""),
    (re.compile(r"\\sum(?=_)"), r"\\sum\\limits"),
    (re.compile(r"\\(log|max|cos)(?![a-z_])"), r"\\,\\\1\\,"),
)
CODE_STYLES = {"light": "friendly", "dark": "github-dark"}
SKIPPED = ("adr/", "losses/", "reference/", "examples/")
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((?!https?:|#)([^)#\s]+)(?:#[^)]*)?\)")
MATH = re.compile(r"^```math\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)


def on_config(config: Any) -> Any:
    """Put every card, and every page that properdocs.yml does not name, into the navigation."""
    named = set(_paths(config.nav))
    others = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
    others = [path for path in others if path not in named and not path.startswith(SKIPPED)]
    for section in config.nav:
        if isinstance(section, dict) and "Guides" in section:
            section["Guides"].extend(others)
        if isinstance(section, dict) and "Cards" in section:
            section["Cards"] = _cards()
    return config


def _cards() -> list[dict[str, Any]]:
    """The card pages by family, which is the first fact on each."""
    families: dict[str, list[dict[str, str]]] = {}
    for path in sorted(DOCS.glob("losses/*.md")):
        found = re.search(r"^\| family \| \[(\w+)\]", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
        families.setdefault(found[1] if found else "other", []).append({path.stem: f"losses/{path.name}"})
    return [{f"{family} losses": families[family]} for family in sorted(families, key="token pair rollout".find)]


def _paths(nav: Any) -> Iterator[str]:
    for entry in nav:
        if isinstance(entry, str):
            yield entry
            continue
        for value in entry.values():
            yield from (value,) if isinstance(value, str) else _paths(value)


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Links to files of the repository that are not part of the site become their path."""
    here = (DOCS / page.file.src_path).parent

    def changed(link: re.Match[str]) -> str:
        target = (here / link[2]).resolve()
        inside = target.is_relative_to(DOCS) and not target.is_relative_to(DOCS / "adr")
        if inside or not target.exists():
            return link[0]
        return f"{link[1]} (`{target.relative_to(DOCS.parent).as_posix()}`)"

    return MATH.sub(lambda block: _formula(block[1]), LINK.sub(changed, markdown))


def _formula(latex: str) -> str:
    """LaTeX as MathML, which browsers draw without a script.

    The converter does not know `\\big`, and sets functions without the space that TeX puts around them. What `\\qquad`
    separates may go onto a line of its own.
    """
    from latex2mathml.converter import convert

    for pattern, replacement in MATHML:
        latex = pattern.sub(replacement, latex)
    parts = (convert(" ".join(part.split()), display="block") for part in latex.split(r"\qquad"))
    return f'<div class="formula">{"".join(parts)}</div>'


def on_page_content(html: str, **_: Any) -> str:
    """A wide table scrolls in a box of its own, not the page."""
    return html.replace("<table>", '<div class="table"><table>').replace("</table>", "</table></div>")


def on_post_build(config: Any) -> None:
    """Write the colors of code, and the search index as a script: a page opened from a folder may not fetch JSON."""
    site = Path(config.site_dir)
    (site / "assets/code.css").write_text(_code_colors(), encoding="utf-8")
    index = json.loads((site / "search/search_index.json").read_text(encoding="utf-8"))["docs"]
    (site / "assets/search.js").write_text(f"const SEARCH = {json.dumps(index)};\n", encoding="utf-8")


def _code_colors() -> str:
    from pygments.formatters import HtmlFormatter

    def rules(scope: str, style: str) -> str:
        lines = HtmlFormatter(style=CODE_STYLES[style]).get_style_defs(f"{scope} .highlight").splitlines()
        # Neither the background, which the theme has, nor built-in names: `eval` in `dpkd eval` is not the shell's.
        return "\n".join(line for line in lines if ".highlight ." in line and ".highlight .nb " not in line)

    dark = rules(':root[data-theme="dark"]', "dark")
    automatic = rules(':root[data-theme="auto"]', "dark")
    light = rules("", "light")
    return f"{light}\n{dark}\n@media (prefers-color-scheme: dark) {{\n{automatic}\n}}\n"
