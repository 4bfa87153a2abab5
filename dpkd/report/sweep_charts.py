"""Charts of a sweep: ranking, cost against quality, collapse of pairs, implicit reward against divergence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dpkd.report.charts import ForestPanel, ForestRow, LinePanel, Panel, Point, PointPanel, chapters, curve
from dpkd.report.correlation import Correlation, correlation
from dpkd.report.experiment import Experiment
from dpkd.report.names import finite, title
from dpkd.report.ranking import Standing, front, sets_of, standings
from dpkd.report.reading import Cost, Run
from dpkd.run_metrics import logps_per_token

MIB_PER_GIB = 1024
# What might go with Rouge-L: divergences and likelihood of the references, and the implicit reward of both texts.
PREDICTORS = ("student_answer_reward_mean", "reward_mean", "forward_kl", "reverse_kl", "first_token_reverse_kl", "nll")


@dataclass(frozen=True)
class _CostAxis:
    key: str
    label: str
    of: Callable[[Cost], float | None]


_AXES = (
    _CostAxis("seconds", "seconds of training", lambda cost: cost.seconds),
    _CostAxis("tokens", "response tokens trained on", lambda cost: cost.tokens),
    _CostAxis("memory", "peak memory, GiB", lambda c: c.peak_memory_mib and c.peak_memory_mib / MIB_PER_GIB),
)


def ranking_panels(table: Sequence[Standing], name: str) -> list[ForestPanel]:
    """Rouge-L of each method with its interval, and beside it the divergence; the references are lines."""
    ranked = [one for one in table if one.rank]
    rouge = tuple(ForestRow(one.run.name, one.color or 0, one.mean, one.interval, one.seeds) for one in ranked)
    note = "95 % bootstrap over rows; small strokes: training seeds"
    panels = [ForestPanel(f"ranking-{name}", f"Rouge-L on {name}", "Rouge-L × 100", rouge, _lines(table), note)]
    found = [(one, kl) for one in table if (kl := score_of(one.run, name, "reverse_kl")) is not None]
    kls = tuple(ForestRow(one.run.name, one.color or 0, kl, None) for one, kl in found if one.rank)
    if kls:
        lines = tuple((one.run.name, kl) for one, kl in found if not one.rank)
        label = "nats per token of the references"
        panels.append(
            ForestPanel(f"ranking-kl-{name}", f"Reverse KL on {name}", label, kls, lines, "in the same order")
        )
    return panels


def _lines(table: Sequence[Standing]) -> tuple[tuple[str, float], ...]:
    return tuple((one.run.name, one.mean) for one in table if not one.rank)


def cost_panels(table: Sequence[Standing], name: str) -> list[PointPanel]:
    """Rouge-L against what training cost, with the best within each budget."""
    panels = []
    for axis in _AXES:
        known = [(one, x) for one in table if one.rank and (x := axis.of(one.run.cost)) is not None]
        if known:
            points = tuple(Point(o.run.name, o.color, str(o.rank), x, o.mean, interval=o.interval) for o, x in known)
            best = front([x for _, x in known], [one.mean for one, _ in known])
            steps = tuple((known[i][1], known[i][0].mean) for i in best)
            note = f"on {name}; numbers: rank; step line: the best within a budget"
            what = axis.label.partition(",")[0].capitalize()
            panels.append(
                PointPanel(
                    f"cost-{axis.key}-{name}", what, axis.label, "Rouge-L", points, "", _lines(table), steps, note
                )
            )
    return panels


def budget_panels(experiment: Experiment) -> list[LinePanel]:
    """Rouge-L on dev rows against seconds and tokens spent, of methods that were scored while they trained."""
    panels = []
    for axis in _AXES[:2]:
        curves = [
            replaced
            for run, color in experiment.members
            if (replaced := curve(_at_cost(run, axis), "rouge_l", run.name, color, True)).last is not None
        ]
        if any(len(one.steps) > 1 for one in curves):
            panels.append(
                LinePanel(
                    f"dev-rouge-by-{axis.key}",
                    f"Rouge-L on dev rows by {axis.key}",
                    tuple(curves),
                    "× 100, dev rows",
                    by_run=True,
                    x_label=axis.label,
                )
            )
    return panels


def _at_cost(run: Run, axis: _CostAxis) -> list[dict[str, float]]:
    """The dev rows of a run, with what it had spent by then in place of the step."""
    rows = []
    for row in run.dev:
        spent = Run(run.name, run.path, metrics=[line for line in run.metrics if line["step"] <= row["step"]]).cost
        if (x := axis.of(spent)) is not None:
            rows.append({"step": x, "rouge_l": row.get("rouge_l", float("nan"))})
    return rows


def has_pairs(run: Run) -> bool:
    """Whether a run logged the log-probs of pairs."""
    return any(logps_per_token(row) is not None for row in run.metrics)


def collapse_panels(experiment: Experiment) -> list[LinePanel]:
    """What shows a collapse of preference training, over steps: log q of both responses, margin, accuracy, KL."""
    found = [(run, color) for run, color in experiment.members if has_pairs(run)]
    per_token = [(run, color, _per_token(run)) for run, color in found]
    charts = [
        ("logp-chosen", "log q(y_w), chosen", "chosen", "nats per token"),
        ("logp-rejected", "log q(y_l), rejected", "rejected", "nats per token"),
    ]
    panels = [
        LinePanel(
            f"collapse-{key}",
            name,
            tuple(curve(rows, metric, run.name, color, False) for run, color, rows in per_token),
            note,
            by_run=True,
        )
        for key, name, metric, note in charts
    ]
    others = (
        ("reward/margin", "Reward margin", "chosen minus rejected, nats"),
        ("reward/accuracy", "Preference accuracy", "share of pairs with the chosen one above"),
        ("kl/reverse", "Reverse KL on the pairs", "nats per token"),
    )
    for metric, name, note in others:
        curves = [curve(run.metrics, metric, run.name, color, False) for run, color in found]
        kept = tuple(one for one in curves if one.last is not None)
        panels.append(LinePanel(f"collapse-{metric.replace('/', '-')}", name, kept, note, by_run=True))
    return [panel for panel in panels if panel.curves]


def _per_token(run: Run) -> list[dict[str, float]]:
    found = [(row["step"], logps) for row in run.metrics if (logps := logps_per_token(row)) is not None]
    return [{"step": step, "chosen": chosen, "rejected": rejected} for step, (chosen, rejected) in found]


def score_of(run: Run, name: str, metric: str) -> float | None:
    """The mean of a metric on a set."""
    one = run.evaluations.get(name)
    return None if one is None else finite(one.metrics.get(metric, {}).get("mean"))


def reward_panels(table: Sequence[Standing], name: str) -> list[PointPanel]:
    """Implicit reward against reverse KL, with Rouge-L as color (DPKD, Figures 3 and 4), of the final models."""
    panels = []
    texts = (("student_answer_reward_mean", "own answers"), ("reward_mean", "references"))
    for metric, what in texts:
        points = []
        for one in table:
            x, y = score_of(one.run, name, "reverse_kl"), score_of(one.run, name, metric)
            if x is not None and y is not None:
                points.append(Point(one.run.name, one.color, str(one.rank or one.run.name), x, y, one.mean))
        if len(points) > 1:
            panels.append(
                PointPanel(
                    f"reward-{metric.replace('_', '-')}-{name}",
                    f"Implicit reward of {what} against KL",
                    "reverse KL, nats per token",
                    "log q/p, nats per token",
                    tuple(points),
                    "Rouge-L",
                    note=f"on {name}, β = 1; numbers: rank",
                )
            )
    return panels


def correlations(table: Sequence[Standing], name: str) -> list[tuple[str, Correlation]]:
    """How Rouge-L goes with other scores of the models on a set, by title; where enough of them have it."""
    found = []
    for metric in PREDICTORS:
        pairs = [(x, one.mean) for one in table if (x := score_of(one.run, name, metric)) is not None]
        result = correlation(*zip(*pairs, strict=True)) if pairs else None
        if result is not None:
            one = next(one.scored for one in table if metric in one.scored.metrics)
            found.append((one.scores.get("titles", {}).get(metric) or title(metric), result))
    return found


def sweep_figures(experiment: Experiment) -> list[Panel]:
    """All charts of the page of a sweep."""
    panels: list[Panel] = []
    for name in sets_of(experiment, ranked=True):
        table = standings(experiment, name)
        panels += [*ranking_panels(table, name), *cost_panels(table, name), *reward_panels(table, name)]
    runs, colors = [run for run, _ in experiment.members], [color for _, color in experiment.members]
    curves = [panel for chapter in chapters(runs, colors) for panel in chapter.panels]
    return [*panels, *budget_panels(experiment), *collapse_panels(experiment), *curves]
