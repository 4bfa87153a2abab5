"""The numbers of runs, sorted into charts.

With one run a chart overlays metrics (forward and reverse KL); with several, every metric has a chart of its own and
the runs are overlaid, so that a color means one thing throughout a page.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from dpkd.report.names import finite, title
from dpkd.report.reading import Run, title_of

LIMIT = 240  # points of a curve


@dataclass(frozen=True)
class Curve:
    """A line: values over steps, None where there is no finite number; `color` counts from 0."""

    label: str
    color: int
    steps: tuple[float, ...]
    values: tuple[float | None, ...]
    dots: bool = False

    @property
    def last(self) -> float | None:
        """The last value that is a number."""
        return next((value for value in reversed(self.values) if value is not None), None)


@dataclass(frozen=True)
class LinePanel:
    """Curves over optimizer steps, or what `x_label` says; `key` names its file.

    `limits` are the ends of the axis (None: what fits).
    `by_run`: the curves are runs, and their names say which.
    """

    key: str
    title: str
    curves: tuple[Curve, ...]
    note: str = ""
    limits: tuple[float, float] | None = None
    by_run: bool = False
    x_label: str = "step"


@dataclass(frozen=True)
class Bar:
    """A mean with its standard deviation (None: not known)."""

    label: str
    color: int
    mean: float
    sd: float | None


@dataclass(frozen=True)
class BarPanel:
    """Bars in named groups, each with a second line of text beneath its name."""

    key: str
    title: str
    groups: tuple[tuple[str, str, tuple[Bar, ...]], ...]
    note: str = ""


@dataclass(frozen=True)
class Trail:
    """The evaluated steps of one run in order: (x, y, value), where the value is shown as color."""

    label: str
    color: int
    points: tuple[tuple[float, float, float], ...]


@dataclass(frozen=True)
class ScatterPanel:
    """One trail per run."""

    key: str
    title: str
    x_label: str
    y_label: str
    value_label: str
    trails: tuple[Trail, ...]
    note: str = ""


@dataclass(frozen=True)
class ForestRow:
    """A score with the ends of its interval (None: not known), and its values under several training seeds."""

    label: str
    color: int
    mean: float
    interval: tuple[float, float] | None
    seeds: tuple[float, ...] = ()


@dataclass(frozen=True)
class ForestPanel:
    """Scores beneath one another, the first on top, with named lines of reference."""

    key: str
    title: str
    x_label: str
    estimates: tuple[ForestRow, ...]
    lines: tuple[tuple[str, float], ...] = ()
    note: str = ""


@dataclass(frozen=True)
class Point:
    """A run between two numbers, with a short tag; `value` is shown as color where the panel names it."""

    label: str
    color: int | None
    tag: str
    x: float
    y: float
    value: float | None = None
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class PointPanel:
    """Runs as points, with named horizontal lines, and the best within each x (`front`) as steps."""

    key: str
    title: str
    x_label: str
    y_label: str
    points: tuple[Point, ...]
    value_label: str = ""
    lines: tuple[tuple[str, float], ...] = ()
    front: tuple[tuple[float, float], ...] = ()
    note: str = ""


Panel = LinePanel | BarPanel | ScatterPanel | ForestPanel | PointPanel


@dataclass(frozen=True)
class Chapter:
    """Panels that answer one question."""

    key: str
    title: str
    about: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True)
class _Chart:
    """What a chart shows: metrics by pattern (`but` some), of metrics.jsonl or of dev.jsonl."""

    key: str
    title: str
    metrics: tuple[str, ...]
    note: str = ""
    dev: bool = False
    but: tuple[str, ...] = ()
    share: bool = False  # between 0 and 1


_LOSS = (
    _Chart(
        "loss-unweighted",
        "Loss terms, unweighted",
        ("loss/main", "loss/lm", "loss/*"),
        "nats per token, or per pair",
        but=("loss/total",),
    ),
    _Chart(
        "loss-weighted",
        "Loss terms, weighted",
        ("weighted/main", "weighted/lm", "weighted/*", "loss/total"),
        "their total is minimized",
    ),
    _Chart("loss-parts", "Parts that the loss names", ("part/*",), "before their weights"),
)
_DIVERGENCE = (
    _Chart("kl", "KL on the text trained on", ("kl/forward", "kl/reverse"), "nats per token, full vocabulary"),
    _Chart("dev-kl", "KL on the dev slice", ("forward_kl", "reverse_kl"), "nats per token of the references", dev=True),
    _Chart("nll", "NLL of the text trained on", ("nll/student", "nll/teacher"), "nats per token"),
    _Chart("dev-nll", "NLL of the dev references", ("nll", "teacher_nll"), "nats per token", dev=True),
    _Chart("agreement", "Same likeliest token", ("agreement/top1",), "share of positions", share=True),
)
_REWARD = (
    _Chart(
        "reward",
        "Implicit reward",
        ("reward/chosen", "reward/rejected", "reward/student", "reward/teacher", "reward/dataset"),
        "β log q(y|x) / p(y|x), nats per response",
    ),
    _Chart(
        "dev-reward",
        "Implicit reward on the dev slice",
        ("reward_mean",),
        "log q/p of the references, nats per token",
        dev=True,
    ),
    _Chart("margin", "Reward margin", ("reward/margin",), "chosen minus rejected, nats"),
    _Chart(
        "accuracy", "Preference accuracy", ("reward/accuracy",), "share of pairs with the chosen one above", share=True
    ),
    _Chart(
        "logp", "Log-probability of the pairs", ("logp/chosen", "logp/rejected"), "under the student, nats per response"
    ),
)
_SCORES = (
    _Chart("dev-rouge", "Rouge-L on the dev slice", ("rouge_l",), "× 100, of generated answers", dev=True),
    _Chart("dev-exact", "Exact match on the dev slice", ("exact_match",), "%", dev=True),
)
_TEXT = (
    _Chart(
        "length",
        "Length of the responses",
        ("length/chosen", "length/rejected", "length/student", "length/teacher", "length/*"),
        "tokens, EOS included",
    ),
    _Chart("dev-length", "Length of the dev answers", ("tokens",), "tokens, EOS included", dev=True),
    _Chart("dev-shape", "Shape of the dev answers", ("eos_rate", "repetition"), "%", dev=True),
    _Chart("truncated", "Responses cut off", ("text/truncated_share",), "share without EOS", share=True),
)
_PACE = (
    _Chart("lr", "Learning rate", ("lr",)),
    _Chart("gradient-norm", "Gradient norm", ("gradient_norm",), "before clipping"),
    _Chart("schedules", "Scheduled settings", ("schedule/*",)),
    _Chart("speed", "Speed", ("tokens_per_second",), "response tokens trained per second"),
)

_LABELS = {
    "kl/forward": "forward KL",
    "kl/reverse": "reverse KL",
    "nll/student": "student",
    "nll/teacher": "teacher",
    "reward/margin": "margin",
    "reward/accuracy": "preference accuracy",
    "agreement/top1": "agreement",
    "text/truncated_share": "share",
    "lr": "learning rate",
    "gradient_norm": "gradient norm",
    "tokens_per_second": "tokens per second",
}


def chapters(runs: Sequence[Run], colors: Sequence[int] | None = None) -> list[Chapter]:
    """All charts over steps that these runs have numbers for; `colors` are theirs (None: one after another)."""
    colors = range(len(runs)) if colors is None else colors
    found = [
        Chapter(
            "scores-over-steps",
            "Scores while training",
            "Answers to rows that were held out of training.",
            (*_drawn(_SCORES, runs, colors), *_trails(runs, colors)),
        ),
        Chapter(
            "divergence",
            "Divergence from the teacher",
            "Forward KL(teacher‖student) asks the student to cover the teacher; reverse KL(student‖teacher) asks "
            "it to stay where the teacher is.",
            _drawn(_DIVERGENCE, runs, colors),
        ),
        Chapter(
            "reward",
            "Implicit reward",
            "What the student has come to prefer over its teacher: r̂ = β log q(y|x) / p(y|x) of whole responses.",
            _drawn(_REWARD, runs, colors),
        ),
        Chapter("loss", "Loss", "What was minimized, and its parts.", _drawn(_LOSS, runs, colors)),
        Chapter("text", "Text trained on", "Lengths of the responses, by who wrote them.", _drawn(_TEXT, runs, colors)),
        Chapter("pace", "Optimization", "Schedule, gradients and speed.", _drawn(_PACE, runs, colors)),
    ]
    return [chapter for chapter in found if chapter.panels]


def _drawn(charts: Sequence[_Chart], runs: Sequence[Run], colors: Sequence[int]) -> tuple[LinePanel, ...]:
    return tuple(panel for chart in charts for panel in _panels(chart, runs, colors))


def _panels(chart: _Chart, runs: Sequence[Run], colors: Sequence[int]) -> list[LinePanel]:
    rows = [run.dev if chart.dev else run.metrics for run in runs]
    names = [name for name in _matching(chart.metrics, rows) if name not in chart.but]
    if len(runs) == 1:
        curves = [curve(rows[0], name, metric_label(name), i, chart.dev) for i, name in enumerate(names)]
        kept = tuple(curve for curve in curves if curve.last is not None)
        return [LinePanel(chart.key, chart.title, kept, chart.note, _limits(chart))] if kept else []
    panels = []
    for name in names if chart.key != "loss-weighted" else _reweighted(names, rows):
        curves = [
            curve(own, name, run.name, color, chart.dev) for run, color, own in zip(runs, colors, rows, strict=True)
        ]
        kept = tuple(curve for curve in curves if curve.last is not None)
        if kept:
            what = (
                chart.title if len(chart.metrics) == 1 and len(names) == 1 else f"{chart.title}: {metric_label(name)}"
            )
            panels.append(LinePanel(f"{chart.key}-{_slug(name)}", what, kept, chart.note, _limits(chart), by_run=True))
    return panels


def _reweighted(names: Sequence[str], rows: Sequence[Sequence[Mapping[str, Any]]]) -> list[str]:
    """Without the weighted terms that are, in all runs, what they are unweighted: their charts would be the same."""

    def same(name: str) -> bool:
        plain = name.replace("weighted/", "loss/")
        return plain != name and all(row.get(name) == row.get(plain) for own in rows for row in own)

    return [name for name in names if not same(name)]


def _limits(chart: _Chart) -> tuple[float, float] | None:
    return (0.0, 1.0) if chart.share else None


def _matching(patterns: Sequence[str], rows: Sequence[Sequence[Mapping[str, Any]]]) -> list[str]:
    """Names of metrics in the order of the patterns, then as found."""
    known = list(dict.fromkeys(name for own in rows for row in own for name in row))
    found = [name for pattern in patterns for name in known if fnmatchcase(name, pattern)]
    return list(dict.fromkeys(found))


def curve(rows: Sequence[Mapping[str, Any]], name: str, label: str, color: int, dots: bool) -> Curve:
    own = [row for row in rows if name in row and finite(row["step"]) is not None]
    steps, values = thin([row["step"] for row in own], [finite(row[name]) for row in own])
    return Curve(label, color, steps, values, dots or len(steps) < 3)


def thin(
    steps: Sequence[float], values: Sequence[float | None], limit: int = LIMIT
) -> tuple[tuple[float, ...], tuple[float | None, ...]]:
    """At most `limit` points, by averaging neighbors, so that the page of a long run is readable and small.

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


def metric_label(name: str) -> str:
    """A metric's name in a legend.

    >>> metric_label("loss/lm"), metric_label("part/pretrain/kl"), metric_label("rouge_l")
    ('lm', 'pretrain kl', 'Rouge-L')
    """
    if name in _LABELS:
        return _LABELS[name]
    return name.partition("/")[2].replace("/", " ").replace("_", " ") if "/" in name else title(name)


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name.lower())


def _trails(runs: Sequence[Run], colors: Sequence[int]) -> tuple[ScatterPanel, ...]:
    """Reward against reverse KL, with Rouge-L as color, of the evaluated steps (DPKD, Figures 3 and 4)."""
    trails = tuple(Trail(run.name, color, _points(run)) for run, color in zip(runs, colors, strict=True))
    if not any(trail.points for trail in trails):
        return ()
    return (
        ScatterPanel(
            "reward-against-kl",
            "Reward against reverse KL",
            "reverse KL, nats per token",
            "implicit reward",
            "Rouge-L",
            tuple(trail for trail in trails if trail.points),
            "on the dev slice; the line follows training",
        ),
    )


def _points(run: Run) -> tuple[tuple[float, float, float], ...]:
    points = []
    for row in run.dev:
        x, y, value = finite(row.get("reverse_kl")), _reward(run, row), finite(row.get("rouge_l"))
        if x is not None and y is not None and value is not None:
            points.append((x, y, value))
    return tuple(points)


def _reward(run: Run, row: Mapping[str, Any]) -> float | None:
    """The reward of an evaluated step: as measured on the dev slice, else that of the nearest logged step."""
    for name in ("reward_mean", "reward_sum", "reward"):
        if (value := finite(row.get(name))) is not None:
            return value
    for name in ("reward/chosen", "reward/dataset", "reward/teacher", "reward/student"):
        logged = [(line["step"], value) for line in run.metrics if (value := finite(line.get(name))) is not None]
        if logged:
            return min(logged, key=lambda pair: abs(pair[0] - row["step"]))[1]
    return None


def length_panels(runs: Sequence[Run]) -> list[BarPanel]:
    """Rouge-L and exact match by length of the reference: one chart per set and metric."""
    panels = []
    for name in dict.fromkeys(name for run in runs for name in run.evaluations):
        for metric in ("rouge_l", "exact_match"):
            panel = _length_panel(runs, name, metric)
            if panel is not None:
                panels.append(panel)
    return panels


def _length_panel(runs: Sequence[Run], name: str, metric: str) -> BarPanel | None:
    groups: dict[str, tuple[int, list[Bar]]] = {}
    units = set()
    for color, run in enumerate(runs):
        lengths = run.evaluations[name].scores.get("lengths", {}) if name in run.evaluations else {}
        for bucket in lengths.get("buckets", []):
            _, bars = groups.setdefault(bucket["label"], (bucket["rows"], []))
            found = bucket["metrics"].get(metric, {})
            if (mean := finite(found.get("mean"))) is not None:
                units.add(lengths.get("unit", "words"))
                bars.append(Bar(run.name, color, mean, finite(found.get("sd"))))
    if not any(bar.mean for _, bars in groups.values() for bar in bars):
        return None  # an exact match of 0 everywhere is a chart of nothing
    shown = tuple((label, f"{rows:,} rows", tuple(bars)) for label, (rows, bars) in groups.items())
    note = f"by {' and '.join(sorted(units))} of the reference; whiskers: sd over seeds"
    return BarPanel(f"length-{_slug(name)}-{_slug(metric)}", f"{_title(metric, runs)} on {name}", shown, note)


def _title(metric: str, runs: Sequence[Run]) -> str:
    return title_of(metric, [one for run in runs for one in run.evaluations.values()])
