"""Run every benchmark (but gpu.py, which needs one) and write the tables into docs/performance.md: `make bench`.

Takes about 35 minutes on two idle cores; --only takes a part. A page without one of the
places for a table, or with another, is an error.

    python benchmarks/all.py [--only step ...] [--tiny]     # --tiny: seconds, prints, writes nothing
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Callable
from pathlib import Path

import cpu_kernels
import growth
import harness
import layouts
import memory
import runs
import sampling
import startup
import step

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
PLACE = re.compile(r"(<!-- measured: (\w+) -->)\n.*?\n?(<!-- end -->)", flags=re.DOTALL)

# Name of the place → function(tiny) that makes its table.
TABLES: dict[str, Callable[[bool], str]] = {
    "startup": lambda tiny: startup.table(1 if tiny else 5),
    "step": lambda tiny: step.table(None, 1 if tiny else 3, "tiny" if tiny else "real", memory=not tiny),
    "cpu_kernels": lambda tiny: cpu_kernels.table(1 if tiny else 5, tiny),
    "layouts": lambda tiny: layouts.table(1 if tiny else 3, tiny),
    "sampling": lambda tiny: sampling.table(1 if tiny else 3, tiny=tiny),
    "growth": lambda tiny: growth.table(1 if tiny else 3, tiny),
    "memory": lambda tiny: memory.table(tiny),
    "runs": lambda tiny: runs.table(None, 1 if tiny else 2, "tiny" if tiny else "real", apart=not tiny),
}


def filled(text: str, tables: dict[str, str]) -> str:
    """The page with these tables in their places. Raises SystemExit when places and tables are not the same names."""
    places = {match[2] for match in PLACE.finditer(text)}
    if places != {*TABLES, "machine"}:
        raise SystemExit(f"{PAGE.name} has places for {sorted(places)}, expected {sorted([*TABLES, 'machine'])}")
    return PLACE.sub(
        lambda match: f"{match[1]}\n{tables[match[2]]}\n{match[3]}" if match[2] in tables else match[0], text
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=list(TABLES), help="repeatable; the other tables stay")
    parser.add_argument("--tiny", action="store_true", help="to see that all run; the page is not written")
    arguments = parser.parse_args()
    page = PAGE.read_text(encoding="utf-8")
    filled(page, {})
    tables = {"machine": f"{harness.machine()}."}
    for name in arguments.only or TABLES:
        began = time.monotonic()
        tables[name] = TABLES[name](arguments.tiny)
        print(f"\n{name} ({time.monotonic() - began:.0f} s)\n\n{tables[name]}\n", flush=True)
        if not arguments.tiny:  # after each, so that nothing is lost when a later one fails
            page = filled(page, tables)
            PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
