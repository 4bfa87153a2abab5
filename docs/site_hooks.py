"""Hooks of the documentation site: the navigation of generated pages, and links that leave the site."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
SKIPPED = ("adr/", "losses/", "reference/", "examples/")
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((?!https?:|#)([^)#\s]+)(?:#[^)]*)?\)")


def on_config(config: Any) -> Any:
    """Put every card, and every page that mkdocs.yml does not name, into the navigation."""
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

    return LINK.sub(changed, markdown)
