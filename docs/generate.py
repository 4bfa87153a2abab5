"""Write the generated parts of the documentation: `python docs/generate.py` (a test compares them with the files).

With `--reference` also docs/reference/, which is not kept in git: `make docs` writes it for the site.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import cards
import reference

from dpkd.scaffold import names_of, rendered

ROOT = Path(__file__).parents[1]
EXAMPLE = Path("docs/examples/dpkd-hello")


def example() -> str:
    """The example package's module, as a code block."""
    source = rendered(names_of("hello", {}), "token")["dpkd_hello.py"]
    return f"```python\n{source.strip()}\n```"


PARTS = {"example": example, "zoo": cards.zoo}


def generated(text: str) -> str:
    """The text with what stands between `<!-- generated: NAME -->` and `<!-- end -->` made anew."""

    def fill(match: re.Match[str]) -> str:
        return f"{match[1]}\n{PARTS[match[2]]()}\n{match[3]}"

    return re.sub(r"(<!-- generated: (\w+) -->)\n.*?\n?(<!-- end -->)", fill, text, flags=re.DOTALL)


def pages() -> dict[Path, str]:
    """Every generated file that is kept in git, by its path from the project's root."""
    mixed = [Path("README.md"), Path("docs/zoo.md")]
    files = {path: generated((ROOT / path).read_text(encoding="utf-8")) for path in mixed}
    files |= {EXAMPLE / name: text for name, text in rendered(names_of("hello", {}), "token").items()}
    return files | {Path("docs/losses") / f"{name}.md": text for name, text in cards.pages().items()}


def stale() -> set[Path]:
    """Files that are not as they would be written now, and cards of losses that are no more."""
    fresh = pages()
    there = {path.relative_to(ROOT) for path in (ROOT / "docs/losses").glob("*.md")}
    same = {path for path, text in fresh.items() if _text(ROOT / path) == text}
    return (set(fresh) | there) - same


def _text(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None


def main() -> None:
    fresh = pages()
    for path in stale():
        if path in fresh:
            (ROOT / path).parent.mkdir(parents=True, exist_ok=True)
            (ROOT / path).write_text(fresh[path], encoding="utf-8")
        else:
            (ROOT / path).unlink(missing_ok=True)
    if "--reference" in sys.argv[1:]:
        (ROOT / "docs/reference").mkdir(exist_ok=True)
        for name, text in reference.pages().items():
            (ROOT / f"docs/reference/{name}.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
