"""Whole runs on the same rows and models: `dpkd train` against TRL's trainers, the published script, and the floor.

GPT-2-shaped student 4 x 256 and teacher 8 x 512, vocabulary 50,257, AdamW, 12 steps of 8 rows, no dropout; prompts of
40 to 120 tokens, responses of 16 to 56, or 48 sampled ones. Each variant runs in a process of its own, and the variants
take turns over the repeats. Time and memory are those of the loop alone: models and data are loaded before. Supervised
tokens are those of responses; the divergence is forward KL to the teacher on rows that no variant trains on.

    python benchmarks/runs.py [--repeats 2] [--only NAME ...] [--tiny]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import loops
import trainers
from harness import call_in_process, markdown
from shapes import GPT2_PAIR, TINY_PAIR, Shape, save_model, write_rows

__all__ = ["VARIANTS", "table"]

BASE = "TRL GKD, off-policy JSD"
SLOW = 45.0  # seconds: a variant whose first run took longer is not repeated


@dataclass(frozen=True)
class Size:
    """Of models, rows and runs."""

    pair: tuple[Shape, Shape] = GPT2_PAIR
    prompt: tuple[int, int] = (40, 120)
    response: tuple[int, int] = (15, 55)
    steps: int = 12
    batch: int = 8
    sampled: int = 48
    length: int = 512  # to which the published script pads


SIZES = {"real": Size(), "tiny": Size(TINY_PAIR, (4, 8), (4, 8), 2, 2, 4, 32)}

# Name → function(folder, size, and more) that returns a `loops.Result`.
VARIANTS: dict[str, tuple[Any, dict[str, Any]]] = {
    BASE: (trainers.gkd, {"on_policy": False}),
    "released script's shape, DPKD + pre-training KD": (loops.released, {}),
    "floor, JSD": (loops.floor, {"loss": "jsd"}),
    "floor, forward KL": (loops.floor, {"loss": "fkl"}),
    "dpkd train --loss jsd": (loops.ours, {"loss": "jsd"}),
    "dpkd train --loss fkl": (loops.ours, {"loss": "fkl"}),
    "dpkd train --loss dpkd-token": (loops.ours, {"loss": "dpkd-token"}),
    "TRL GKD, on-policy": (trainers.gkd, {"on_policy": True}),
    "TRL DistillationTrainer, on-policy": (trainers.distillation, {}),
    "floor, on-policy JSD": (loops.floor, {"loss": "jsd", "on_policy": True}),
    "dpkd train --loss jsd, on-policy": (loops.ours, {"loss": "jsd", "on_policy": True}),
    "TRL DPOTrainer, the teacher as reference": (trainers.dpo, {}),
    "dpkd train --loss dpkd, pairs": (loops.ours, {"loss": "dpkd", "pairs": True}),
}


def prepare(folder: str, size: str) -> None:
    """Models, rows to train on and to probe, second responses for pairs."""
    root, one = Path(folder), SIZES[size]
    for name, shape, seed in (("student", one.pair[0], 0), ("teacher", one.pair[1], 1)):
        save_model(shape, root / name, seed)
    write_rows(root / "rows.jsonl", one.steps * one.batch, one.prompt, one.response)
    write_rows(root / "probe.jsonl", 2 * one.batch, one.prompt, one.response, seed=1)
    write_rows(root / "second.jsonl", one.steps * one.batch, one.prompt, (one.sampled, one.sampled), seed=2)


def run(folder: str, size: str, name: str) -> dict[str, float]:
    """One run of a variant in this process."""
    function, settings = VARIANTS[name]
    result = function(Path(folder), SIZES[size], **settings)
    return {
        "seconds": result.seconds,
        "steps": result.steps,
        "tokens": result.tokens,
        "growth": result.growth,
        "divergence": loops.divergence(result.model, Path(folder)),
    }


def collect(names: list[str], repeats: int, size: str, *, apart: bool = True) -> dict[str, dict[str, float]]:
    """Medians by variant; `apart` gives each run its own process."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        call_in_process("runs", "prepare", folder, size) if apart else prepare(folder, size)
        for repeat in range(repeats):
            for name, results in found.items():
                if repeat and results[0]["seconds"] > SLOW:
                    continue
                results.append(call_in_process("runs", "run", folder, size, name) if apart else run(folder, size, name))
                print(f"{name}: {results[-1]}", flush=True)
    return {
        name: {key: statistics.median(result[key] for result in results) for key in results[0]}
        for name, results in found.items()
    }


def table(names: list[str] | None = None, repeats: int = 2, size: str = "real", *, apart: bool = True) -> str:
    """The variants of these names, or all."""
    found = collect(names or list(VARIANTS), repeats, size, apart=apart)
    speeds = {name: one["tokens"] / one["seconds"] for name, one in found.items()}
    base = speeds.get(BASE, min(speeds.values()))
    rows = [
        [
            name,
            f"{one['seconds'] / one['steps']:.2f}",
            f"{speeds[name]:,.0f}",
            f"{speeds[name] / base:.2f}",
            f"{one['growth']:,.0f}",
            f"{one['divergence']:.3f}" + ("" if one["steps"] == SIZES[size].steps else " *"),
        ]
        for name, one in found.items()
    ]
    head = ["run", "s/step", "supervised tokens/s", "of TRL GKD", "memory growth, MiB", "KL to the teacher after"]
    return markdown(head, rows) + f"\n\n\\* after {loops.RELEASED_STEPS} steps only."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--only", action="append", choices=list(VARIANTS))
    parser.add_argument("--tiny", action="store_true", help="to see that it runs, not what it says")
    arguments = parser.parse_args()
    print(table(arguments.only, arguments.repeats, "tiny" if arguments.tiny else "real"))


if __name__ == "__main__":
    main()
