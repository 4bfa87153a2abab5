"""Float64 oracles of the pair losses, in plain Python loops: written from the formulas, without torch and without dpkd.

Each takes what the conformance kit hands to a reference (tuples of arrays: chosen, rejected) and the settings,
and returns one value per pair.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

Arrays = tuple[Any, Any]


def softplus(z: float) -> float:
    """log(1 + exp z), which is -log σ(-z)."""
    return z + math.log1p(math.exp(-z)) if z > 0 else math.log1p(math.exp(z))


def sigma(z: float) -> float:
    """σ(z)."""
    return 1 / (1 + math.exp(-z)) if z > -700 else math.exp(z)


def rewards(student: Arrays, lengths: Arrays, how: str, anchor: Arrays | None = None) -> Iterator[tuple[float, float]]:
    """For each pair log q (or log q/anchor) of y_t and y_s; of the whole response, or per token."""
    for i in range(len(student[0])):
        pair = []
        for side in (0, 1):
            value = float(student[side][i]) - (0.0 if anchor is None else float(anchor[side][i]))
            pair.append(value / float(lengths[side][i]) if how == "mean" else value)
        yield pair[0], pair[1]


def _each(pairs: Iterator[tuple[float, float]], value: Callable[[float, float], float]) -> np.ndarray:
    return np.array([value(t, s) for t, s in pairs], dtype=np.float64)


def dpop(*, student: Arrays, teacher: Arrays, lengths: Arrays, config: Any) -> np.ndarray:
    """Smaug: `-log σ(β (h - λ max(0, log p/q(y_t))))`."""

    def value(t: float, s: float) -> float:
        lacking = -t if t < 0 else 0.0
        return softplus(-config.beta * (t - s - config.dpop_weight * lacking))

    return _each(rewards(student, lengths, config.aggregation, teacher), value)


def orpo(*, student: Arrays, lengths: Arrays, config: Any) -> np.ndarray:
    """ORPO from probabilities: odds = P/(1-P)."""

    def log_odds(logp: float) -> float:
        return logp - math.log(-math.expm1(logp))

    def value(t: float, s: float) -> float:
        return -t + config.odds_weight * softplus(log_odds(s) - log_odds(t))

    return _each(rewards(student, lengths, "mean"), value)


def hinge(*, student: Arrays, lengths: Arrays, config: Any, teacher: Arrays | None = None) -> np.ndarray:
    """SLiC and RSO's hinge-norm."""
    pairs = rewards(student, lengths, config.aggregation, teacher)
    return _each(pairs, lambda t, s: max(0.0, 1 - config.beta * (t - s)))


def robust(*, student: Arrays, teacher: Arrays, lengths: Arrays, config: Any) -> np.ndarray:
    """rDPO: the noise matrix inverted by hand.

    A clean loss ℓ(m) is seen as (1-ε) ℓ(m) + ε ℓ(-m); the 2x2 system of both labels is solved for the clean loss.
    """
    noise = np.array([[1 - config.flipped, config.flipped], [config.flipped, 1 - config.flipped]])

    def value(t: float, s: float) -> float:
        margin = config.beta * (t - s)
        corrected = np.linalg.solve(noise, np.array([softplus(-margin), softplus(margin)]))
        return float(corrected[0])

    return _each(rewards(student, lengths, config.aggregation, teacher), value)


def exo(*, student: Arrays, teacher: Arrays, lengths: Arrays, config: Any) -> np.ndarray:
    """KL of two coins, term by term."""

    def value(t: float, s: float) -> float:
        margin, total = config.beta * (t - s), 0.0
        for sign, label in ((1, 1 - config.label_smoothing), (-1, config.label_smoothing)):
            log_share = -softplus(-sign * margin)
            total += math.exp(log_share) * (log_share - math.log(label))
        return total

    return _each(rewards(student, lengths, config.aggregation, teacher), value)


def apo(*, student: Arrays, teacher: Arrays, lengths: Arrays, config: Any) -> np.ndarray:
    """APO, Eq. 7 and 8 as printed."""

    def value(t: float, s: float) -> float:
        r_t, r_s = config.beta * t, config.beta * s
        if config.form == "zero":
            return 1 - sigma(r_t) + sigma(r_s)
        return sigma(r_t) + 1 - sigma(r_t - r_s)

    return _each(rewards(student, lengths, config.aggregation, teacher), value)


def plad(*, student: Arrays, lengths: Arrays, config: Any, teacher: Arrays | None = None) -> np.ndarray:
    """Ranking with δ, or with the teacher's difference per token as δ."""
    values = []
    wanted = [(config.margin, 0.0)] * len(student[0]) if teacher is None else rewards(teacher, lengths, "mean")
    for (t, s), (w_t, w_s) in zip(rewards(student, lengths, "mean"), wanted, strict=True):
        values.append(max(0.0, w_t - w_s - t + s))
    return np.array(values)


def dpo(*, student: Arrays, reference: Arrays, lengths: Arrays, config: Any) -> np.ndarray:
    """DPO with a share of flipped labels."""

    def value(t: float, s: float) -> float:
        margin, share = config.beta * (t - s), config.label_smoothing
        return (1 - share) * softplus(-margin) + share * softplus(margin)

    return _each(rewards(student, lengths, config.aggregation, reference), value)


def dadpo(*, student: Arrays, teacher: Arrays, reference: Arrays, lengths: Arrays, config: Any) -> np.ndarray:
    """Two log-ratios inside one sigmoid."""
    start = rewards(student, lengths, config.aggregation, reference)
    towards = rewards(student, lengths, config.aggregation, teacher)
    return np.array(
        [
            softplus(-config.beta_start * (a - b) - config.beta_teacher * (c - d))
            for (a, b), (c, d) in zip(start, towards, strict=True)
        ]
    )
