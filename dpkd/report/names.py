"""Metrics and numbers as reports and tables show them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import cache
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

from dpkd.api import MetricSpec
from dpkd.evaluation import metrics

LARGEST = 1e100  # beyond it, a value counts as infinite: no axis is as long
FIRST = (
    "rouge_l",
    "exact_match",
    "nll",
    "forward_kl",
    "reverse_kl",
)  # what the papers report, in tables before all else


@cache
def _built_in() -> dict[str, MetricSpec]:
    """The metrics of this package; a stranger's are labelled by the scores.json that has them."""
    modules = [import_module(f"{metrics.__name__}.{module.name}") for module in iter_modules(metrics.__path__)]
    return {spec.name: spec for module in modules for spec in module.dpkd_metrics()}


def title(metric: str) -> str:
    """A metric's name for people.

    >>> title("rouge_l"), title("nll"), title("my_metric")
    ('Rouge-L', 'NLL', 'my metric')
    """
    for who in ("student", "teacher"):
        if metric.startswith(f"{who}_answer_"):
            return f"{title(metric.removeprefix(f'{who}_answer_'))} (answers of the {who})"
    return _built_in()[metric].title if metric in _built_in() else metric.replace("_", " ")


def better_by_name(metric: str) -> str:
    """`higher`, `lower`, or empty where neither is better: for scores that do not say it themselves."""
    return _built_in()[metric].better if metric in _built_in() else ""


def ordered(names: Iterable[str]) -> list[str]:
    """What the papers report first, then the rest as found; each once.

    >>> ordered(["nll", "mine", "rouge_l", "nll"])
    ['rouge_l', 'nll', 'mine']
    """
    found = list(dict.fromkeys(names))
    return [name for name in FIRST if name in found] + [name for name in found if name not in FIRST]


def finite(value: object) -> float | None:
    """A value as a number; None where it is not one that can be shown."""
    try:
        shown = float(value) if isinstance(value, int | float) else math.nan
    except OverflowError:  # an integer beyond float64
        return None
    return shown if abs(shown) < LARGEST else None


def number(value: float | None) -> str:
    """Enough digits to tell runs apart, no more.

    >>> number(24.618), number(-1.0426), number(12345.6), number(1e-07), number(None)
    ('24.62', '−1.043', '12,346', '1.0e−07', '–')
    """
    if value is None or value != value:
        return "–"
    size = abs(value)
    if 0 < size < 0.001 or size >= 1e12:
        text = f"{value:.1e}"
    else:
        text = f"{value:,.0f}" if size >= 1000 else f"{value:.2f}" if size >= 10 else f"{value:.3f}"
    return text.replace("-", "−")


def spread(mean: float | None, sd: float | None) -> str:
    """Mean ± standard deviation, with the digits of the mean.

    >>> spread(24.618, 0.3123), spread(2.0, None)
    ('24.62 ± 0.31', '2.000')
    """
    if mean is None or sd is None:
        return number(mean)
    digits = 0 if abs(mean) >= 1000 else 2 if abs(mean) >= 10 else 3
    return f"{number(mean)} ± {sd:,.{digits}f}"


def compact(value: float) -> str:
    """A number in few characters.

    >>> compact(0.25), compact(1500.0), compact(2e-05), compact(-3.0), compact(0.0)
    ('0.25', '1.5k', '2e-5', '−3', '0')
    """
    size = abs(value)
    if size >= 1e9 or 0 < size < 1e-3:
        text = f"{value:.3g}".replace("e-0", "e-").replace("e+0", "e")
    elif size >= 1e6:
        text = f"{value / 1e6:.4g}M"
    else:
        text = f"{value / 1e3:.4g}k" if size >= 1e3 else f"{value:.4g}"
    return text.replace("-", "−", 1) if value < 0 else text


def duration(seconds: float | None) -> str:
    """A time for people.

    >>> duration(4.21), duration(184), duration(7384), duration(None)
    ('4.2 s', '3 min 4 s', '2 h 3 min', '–')
    """
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def memory(mib: float | None) -> str:
    """Memory for people.

    >>> memory(544.2), memory(9216.0), memory(None)
    ('544 MiB', '9.0 GiB', '–')
    """
    if mib is None:
        return "–"
    return f"{mib:.0f} MiB" if mib < 1024 else f"{mib / 1024:.1f} GiB"


def tokens(count: float | None) -> str:
    """A number of tokens, in three digits.

    >>> tokens(163840.0), tokens(None)
    ('164k', '–')
    """
    return "–" if count is None else compact(float(f"{count:.3g}"))


def public(value: object) -> str:
    """A value as text; an absolute path by its last part, since a page is read on other machines too.

    >>> public("/home/me/models/gpt2"), public("gpt2"), public(None), public(True)
    ('gpt2', 'gpt2', 'none', 'true')
    """
    if value is None or isinstance(value, bool):
        return "none" if value is None else str(value).lower()
    if isinstance(value, list):
        return ", ".join(map(public, value)) or "[]"
    text = str(value)
    path = Path(text)
    return path.name if path.is_absolute() and path.name else text
