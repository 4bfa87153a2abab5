"""Whether one number of the runs goes with another: Pearson's r with its interval, and Spearman's ρ."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_NORMAL_975 = 1.959963984540054  # 97.5 % quantile of the standard normal distribution


@dataclass(frozen=True)
class Correlation:
    """Pearson's r over `count` pairs with its 95 % interval, and Spearman's ρ."""

    pearson: float
    low: float
    high: float
    spearman: float
    count: int


def correlation(xs: Sequence[float], ys: Sequence[float]) -> Correlation | None:
    """Correlate two numbers of the same runs; None for fewer than four runs, or where one number is the same for all.

    The interval is Fisher's: tanh(artanh r ± 1.96 / √(n - 3)), for independent pairs that are jointly normal.
    """
    pearson, spearman = _pearson(xs, ys), _pearson(ranks(xs), ranks(ys))
    if len(xs) < 4 or pearson is None or spearman is None:
        return None
    center = math.atanh(max(-1 + 1e-15, min(1 - 1e-15, pearson)))
    reach = _NORMAL_975 / math.sqrt(len(xs) - 3)
    return Correlation(pearson, math.tanh(center - reach), math.tanh(center + reach), spearman, len(xs))


def _pearson(xs: Sequence[float], ys: Sequence[float]) -> float | None:
    import numpy as np

    x_N, y_N = (_centered(np.asarray(values, dtype=np.float64)) for values in (xs, ys))
    scale = math.sqrt(float(x_N @ x_N) * float(y_N @ y_N))
    return float(x_N @ y_N) / scale if scale else None


def _centered(values_N: Any) -> Any:
    """The values less their mean; exactly 0 where they are all the same."""
    return values_N * 0.0 if (values_N == values_N[:1]).all() else values_N - values_N.mean()


def ranks(values: Sequence[float]) -> list[float]:
    """Places from 1 in rising order; equal values share the mean of theirs.

    >>> ranks([0.3, 0.1, 0.3])
    [2.5, 1.0, 2.5]
    """
    return [
        sum(other < value for other in values) + (1 + sum(other == value for other in values)) / 2 for value in values
    ]
