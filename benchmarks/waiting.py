"""A short run alone and beside a busy process, with OpenMP's own way to wait and with the one that dpkd sets.

A thread of OpenMP that waits for the others spins at first; on a core that another process needs as well, the thread
that it waits for may not run meanwhile. `OMP_WAIT_POLICY=PASSIVE` lets it sleep. libgomp reads it once, when torch is
imported.

    python benchmarks/waiting.py [--repeats 3] [--tiny]
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from harness import call_in_process, markdown

__all__ = ["table"]

POLICIES: dict[str, dict[str, str]] = {"libgomp's default": {}, "PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"}}
RUN = "dpkd train --loss jsd"


@contextmanager
def beside(busy: int) -> Iterator[None]:
    """That many processes compute without a pause for the time of the block."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def table(repeats: int = 3, size: str = "real") -> str:
    """Seconds per step; ways to wait and neighbours take turns."""
    os.environ.pop("OMP_WAIT_POLICY", None)
    cases = [(name, busy) for name in POLICIES for busy in (0, 1)]
    found: dict[tuple[str, int], list[float]] = {case: [] for case in cases}
    with tempfile.TemporaryDirectory() as folder:
        call_in_process("runs", "prepare", folder, size)
        for _ in range(repeats):
            for name, busy in cases:
                with beside(busy):
                    one = call_in_process("runs", "run", folder, size, RUN, environment=POLICIES[name])
                found[name, busy].append(one["seconds"] / one["steps"])
                print(f"{name}, {busy} beside it: {found[name, busy][-1]:.3f} s/step", flush=True)
    median = {case: statistics.median(seconds) for case, seconds in found.items()}
    rows = [
        [name, *(f"{median[name, busy]:.3f}" for busy in (0, 1)), f"{median[name, 1] / median[name, 0]:.2f}"]
        for name in POLICIES
    ]
    return markdown(["OMP_WAIT_POLICY", "alone, s/step", "beside a busy process, s/step", "ratio"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="to see that it runs, not what it says")
    arguments = parser.parse_args()
    print(table(1 if arguments.tiny else arguments.repeats, "tiny" if arguments.tiny else "real"))


if __name__ == "__main__":
    main()
