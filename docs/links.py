"""Asks for every external link of the documentation: `make links`. It needs the network, so no test runs it.

Links between pages, and their anchors, are checked by `make docs`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"https?://[^\s<>\"'`)\]|{}]+")
EXAMPLES = ("http://localhost", "http://127.", "https://example.")
REFUSALS = {401, 403, 405, 429}  # a machine is not welcome: the page may well be there
Ask = Callable[[str], int]


def pages() -> Iterator[Path]:
    """Every Markdown file of the repository but the generated reference."""
    yield from sorted(ROOT.glob("*.md"))
    yield from (page for page in sorted((ROOT / "docs").rglob("*.md")) if "reference" not in page.parts)


def links(files: Iterable[Path]) -> dict[str, list[str]]:
    """External links, each with the files that it stands in; examples of addresses are none."""
    found: dict[str, list[str]] = {}
    for file in files:
        for link in LINK.findall(file.read_text(encoding="utf-8")):
            link = link.rstrip(".,;:*").partition("#")[0]
            places = found.setdefault(link, [])
            if file.name not in places:
                places.append(file.name)
    return {link: places for link, places in found.items() if not link.startswith(EXAMPLES)}


def ask(link: str) -> int:
    """The HTTP status of a page. Raises OSError when there is no answer."""
    request = Request(link, headers={"User-Agent": "Mozilla/5.0 (dpkd link check)"})
    try:
        with urlopen(request, timeout=20) as answer:
            return int(answer.status)
    except HTTPError as error:
        return error.code


def problem(link: str, get: Ask = ask) -> str | None:
    """What is wrong with a link, or None."""
    try:
        status = get(link)
    except (URLError, OSError, ValueError) as error:
        return f"no answer ({error})"
    return None if status < 400 or status in REFUSALS else f"status {status}"


def main(get: Ask = ask) -> int:
    """Print the links that lead nowhere, with their files; 1 if there are any."""
    found = links(pages())
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda link: problem(link, get), found))
    broken = [(link, why) for link, why in zip(found, answers, strict=True) if why]
    for link, why in broken:
        sys.stdout.write(f"{link}: {why}, in {', '.join(found[link])}\n")
    sys.stdout.write(f"{len(found)} links, {len(broken)} broken\n")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
