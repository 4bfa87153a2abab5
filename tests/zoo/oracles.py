"""Float64 oracles in plain Python loops: written from the papers' formulas, without torch and without dpkd.

`log_p` is the teacher's row of log-probabilities, `log_q` the student's, `ids` token ids.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

Row = Sequence[float]


def log_probs(logits: Row, temperature: float = 1.0) -> list[float]:
    """log softmax of one row; -inf stays -inf."""
    scaled = [float(z) / temperature for z in logits]
    top = max(scaled)
    total = math.log(sum(math.exp(z - top) for z in scaled)) + top
    return [z - total for z in scaled]


def divergence(log_a: Row, log_b: Row) -> float:
    """KL(a‖b) = Σ a log(a/b), with 0 log 0 = 0."""
    value = 0.0
    for a, b in zip(log_a, log_b, strict=True):
        if a != -math.inf:
            value += math.exp(a) * (a - b)
    return value


def minus_log_sigmoid(z: float) -> float:
    """-log σ(z)."""
    return math.log1p(math.exp(-z)) if z > 0 else -z + math.log1p(math.exp(z))


def sigmoid(z: float) -> float:
    """σ(z)."""
    return 1 / (1 + math.exp(-z))


def head_of(log_p: Row, mu: float, boundary: str) -> set[int]:
    """AKL's head: the likeliest tokens, up to a mass of μ, with or without the one that crosses it."""
    head: set[int] = set()
    mass = 0.0
    for v in sorted(range(len(log_p)), key=lambda v: -log_p[v]):
        after = mass + math.exp(log_p[v])
        if (boundary == "paper" and mass < mu) or (boundary == "released" and (not head or after <= mu)):
            head.add(v)
        mass = after
    return head


def adaptive_kl(log_p: Row, log_q: Row, mu: float, boundary: str) -> float:
    """AKL §4.2, one row."""
    head = head_of(log_p, mu, boundary)
    gaps = [abs(math.exp(a) - math.exp(b)) for a, b in zip(log_p, log_q, strict=True)]
    g_head = sum(g for v, g in enumerate(gaps) if v in head)
    g_tail = sum(g for v, g in enumerate(gaps) if v not in head)
    forward, backward = divergence(log_p, log_q), divergence(log_q, log_p)
    return (g_head * forward + g_tail * backward) / (g_head + g_tail)


def returns(
    rewards: Row, *, discount: float = 1.0, include_current: bool = False, normalise: bool = False
) -> list[float]:
    """For each token of one response the discounted sum of the rewards after it (or from it)."""
    values = []
    for t in range(len(rewards)):
        later = list(rewards[t:] if include_current else rewards[t + 1 :])
        total = sum(discount**k * r for k, r in enumerate(later))
        values.append(total / len(later) if normalise and later else total)
    return values


def rows(logits: object) -> np.ndarray:
    """A tensor or nested list as float64 rows."""
    return np.asarray(logits, dtype=np.float64)
