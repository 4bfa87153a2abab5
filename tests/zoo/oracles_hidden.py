"""Float64 oracles of the losses on hidden states, in plain Python loops: one position, one pair of layers at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

__all__ = ["cosine", "hidden_reference", "squared"]

Vector = list[float]


def hidden_reference(of_pair: Callable[[Vector, Vector], float]) -> Callable[..., Any]:
    """The sum over pairs of layers, for all rows of a batch; `weights` has the loss's own matrices."""

    def values(*, student_hidden: Any, teacher_hidden: Any, weights: dict[str, Any], config: Any) -> Any:
        found = []
        for ours, theirs in zip(student_hidden.tolist(), teacher_hidden.tolist(), strict=True):
            total = 0.0
            for k, (s, t) in enumerate(zip(ours, theirs, strict=True)):
                matrix = weights["weight"][k].tolist() if config.projection == "learned" else None
                mapped = s if matrix is None else [sum(w * v for w, v in zip(row, s, strict=True)) for row in matrix]
                total += of_pair(mapped, t)
            found.append(total)
        return np.array(found)

    return values


def squared(mapped: Vector, target: Vector) -> float:
    """Mean over dimensions of the squared gap."""
    return sum((a - b) ** 2 for a, b in zip(mapped, target, strict=True)) / len(target)


def cosine(mapped: Vector, target: Vector) -> float:
    """1 - cos of the angle."""
    dot = sum(a * b for a, b in zip(mapped, target, strict=True))
    lengths = math.sqrt(sum(a * a for a in mapped)) * math.sqrt(sum(b * b for b in target))
    return 1 - dot / lengths
