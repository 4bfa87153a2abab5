"""How long the commands take that a user types most, against what Python and torch alone take.

python benchmarks/startup.py [--repeats 7] [--tiny]
"""

from __future__ import annotations

import argparse
import subprocess
import sys

from harness import markdown, seconds_of

__all__ = ["table"]

RUN = "import sys; sys.argv[1:] = {words}; from dpkd.cli.main import main; main()"
COMMANDS = {
    "python -c pass": "pass",
    "python -c 'import torch'": "import torch",
    "dpkd --help": RUN.format(words=["--help"]),
    "dpkd train --help": RUN.format(words=["train", "--help"]),
    "dpkd list-losses": RUN.format(words=["list-losses"]),
    "dpkd describe-loss dpkd": RUN.format(words=["describe-loss", "dpkd"]),
}
TORCH = "python -c 'import torch'"


def _run(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def targets(found: dict[str, float]) -> dict[str, tuple[str, bool]]:
    """Command → its target, and whether it is met."""
    return {
        "dpkd --help": ("< 0.4 s", found["dpkd --help"] < 0.4),
        "dpkd list-losses": ("< 1.5 × import torch", found["dpkd list-losses"] < 1.5 * found[TORCH]),
    }


def table(repeats: int = 7) -> str:
    found = seconds_of({name: lambda code=code: _run(code) for name, code in COMMANDS.items()}, repeats)
    goals = targets(found)
    rows = []
    for name, seconds in found.items():
        goal, met = goals.get(name, ("", True))
        rows.append(
            [f"`{name}`", f"{seconds:.2f}", f"{seconds / found[TORCH]:.2f}", goal + ("" if met else ": missed")]
        )
    return markdown(["command", "seconds", "of `import torch`", "target"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--tiny", action="store_true", help="one repeat")
    arguments = parser.parse_args()
    print(table(1 if arguments.tiny else arguments.repeats))


if __name__ == "__main__":
    main()
