"""Numbers to places on a chart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Scale:
    """A linear map of values to pixels."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """The place of a value.

        >>> Scale(0, 10, 100, 0)(2.5)
        75.0
        """
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def finite(value: object) -> float | None:
    """A value as a number, or None where it is not one that can be drawn."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers between two values, about `count` of them.

    >>> ticks(0.3, 9.7), ticks(-1, 1, 4)
    ([2.0, 4.0, 6.0, 8.0], [-1.0, -0.5, 0.0, 0.5, 1.0])
    """
    rough = (high - low) / max(1, count)
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [float(f"{index * step:.12g}") for index in range(first, last + 1)]


def value_range(values: Sequence[float], *, zero: bool = False) -> tuple[float, float]:
    """Ends of an axis: the values with a little room; with zero where it is asked for, or not far away.

    >>> value_range([1.0, 10.0]), value_range([5.0]), value_range([0.0])
    ((0.0, 10.5), (4.5, 5.5), (0.0, 1.0))
    """
    if not any(values):
        return 0.0, 1.0
    low, high = min(values), max(values)
    if zero or 0 < low < 0.35 * high:
        low = min(low, 0.0)
    if zero or (high < 0 and high > 0.35 * low):
        high = max(high, 0.0)
    room = 0.05 * (high - low) if high > low else max(abs(high) * 0.1, 1e-6)
    return (low if low == 0 and high > 0 else low - room), (high if high == 0 and low < 0 else high + room)


def label(value: float) -> str:
    """A number on an axis.

    >>> label(0.25), label(1500.0), label(2e-05), label(-3.0), label(0.0)
    ('0.25', '1.5k', '2e-5', '−3', '0')
    """
    size = abs(value)
    if size >= 1e9 or 0 < size < 1e-3:
        text = f"{value:.3g}".replace("e-0", "e-").replace("e+0", "e")
    elif size >= 1e6:
        text = f"{value / 1e6:.4g}M"
    elif size >= 1e3:
        text = f"{value / 1e3:.4g}k"
    else:
        text = f"{value:.4g}"
    return text.replace("-", "−", 1) if value < 0 else text


def thin(
    steps: Sequence[float], values: Sequence[float | None], limit: int = 240
) -> tuple[tuple[float, ...], tuple[float | None, ...]]:
    """At most `limit` points: neighbours averaged, so that a long run is readable and its page small.

    >>> thin([1, 2, 3, 4], [1.0, 3.0, None, None], limit=2)
    ((1.5, 3.5), (2.0, None))
    """
    if len(steps) <= limit:
        return tuple(steps), tuple(values)
    size = math.ceil(len(steps) / limit)
    places, means = [], []
    for start in range(0, len(steps), size):
        known = [value for value in values[start : start + size] if value is not None]
        group = steps[start : start + size]
        places.append(sum(group) / len(group))
        means.append(sum(known) / len(known) if known else None)
    return tuple(places), tuple(means)
