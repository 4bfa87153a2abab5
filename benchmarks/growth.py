"""How the cost of a step grows: dpkd's engine against the same loss written densely, on response positions alone.

The dense form is the fair opponent: it leaves out prompts and padding too, and takes logits [N, V] of all response
positions at once. Each line changes one thing of the middle: batch 8, responses of 64 tokens after prompts of 64,
vocabulary 50,257, student 4 x 256, teacher 8 x 512. Nothing should take more than 1.05 times the dense form.

    python benchmarks/growth.py [--repeats 5] [--tiny]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import peers
from harness import call_in_process, markdown, peak_mib, resident_mib, seconds_of
from ours import engine_step
from shapes import Shape, new_model, sequences

__all__ = ["table"]

LIMIT = 1.05


@dataclass(frozen=True)
class Point:
    """One size."""

    what: str
    loss: str = "fkl"
    batch: int = 8
    response: int = 64
    prompt: int = 64
    vocabulary: int = 50257
    layers: int = 4
    width: int = 256

    def models(self) -> peers.Models:
        common = {"vocabulary": self.vocabulary, "positions": self.prompt + self.response}
        student = new_model(Shape(self.layers, self.width, 4, **common))
        teacher = new_model(Shape(2 * self.layers, 2 * self.width, 8, **common), 1)
        return student.train(), teacher.eval().requires_grad_(False)

    def steps(self) -> dict[str, Callable[[], Any]]:
        models = self.models()
        rows = sequences(self.batch, (self.prompt, self.prompt), (self.response // 2, self.response), self.vocabulary)
        return {
            "dense": peers.dense(self.loss, models, rows, self.vocabulary - 1),
            "dpkd": engine_step(self.loss, models, rows),
        }


def points() -> list[Point]:
    middle = Point("middle")
    found = [middle, replace(middle, what="JSD", loss="jsd")]
    found += [replace(middle, what=f"batch {n}", batch=n) for n in (2, 4, 16)]
    found += [replace(middle, what=f"response {n}", response=n) for n in (32, 128, 256)]
    found += [replace(middle, what=f"vocabulary {n:,}", vocabulary=n) for n in (512, 4096, 131072, 262144)]
    shapes = ((2, 64), (4, 128), (8, 512))
    return found + [replace(middle, what=f"student {n} x {h}", layers=n, width=h) for n, h in shapes]


TINY = [Point("tiny", "jsd", 2, 8, 4, 64, 1, 16)]


def growth_mib(index: int, who: str) -> float:
    """Peak memory of this process above what it had with the models loaded, over two steps."""
    step = points()[index].steps()[who]
    before = resident_mib()
    for _ in range(2):
        step()
    return peak_mib() - before


def row(point: Point, repeats: int, index: int | None) -> list[str]:
    """A line of the table; without an index memory is left out."""
    taken = seconds_of(point.steps(), repeats)
    ratio = taken["dpkd"] / taken["dense"]
    cells = [point.what, f"{1000 * taken['dense']:,.0f}", f"{1000 * taken['dpkd']:,.0f}", f"{ratio:.2f}"]
    if index is None:
        memory = ["–", "–", "–"]
    else:
        dense, own = (call_in_process("growth", "growth_mib", index, who) for who in ("dense", "dpkd"))
        memory = [f"{dense:,.0f}", f"{own:,.0f}", f"{own / max(dense, 1.0):.2f}"]
    return [*cells, *memory, "" if ratio <= LIMIT else f"above {LIMIT}"]


def table(repeats: int = 5, tiny: bool = False, memory: bool = True) -> str:
    head = ["size", "dense, ms", "dpkd, ms", "time ratio", "dense, MiB", "dpkd, MiB", "memory ratio", "target"]
    chosen = TINY if tiny else points()
    return markdown(head, [row(p, repeats, i if memory and not tiny else None) for i, p in enumerate(chosen)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="to see that it runs, not what it says")
    parser.add_argument("--no-memory", action="store_true", help="times only")
    arguments = parser.parse_args()
    print(table(arguments.repeats, arguments.tiny, not arguments.no_memory))


if __name__ == "__main__":
    main()
