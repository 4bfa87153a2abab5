"""Runs by sets by metrics: means, spread over seeds, significance against a baseline, and what training cost."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dpkd.errors import SettingsError
from dpkd.report.bootstrap import RESAMPLES, SEED, Difference, holm, paired_bootstrap
from dpkd.report.names import FIRST, finite, ordered
from dpkd.report.reading import Cost, Run, Scored, better_of, title_of


@dataclass(frozen=True)
class Cell:
    """A metric of a run on a set; `difference` is to the baseline, where the rows' own scores are known."""

    mean: float
    sd: float | None
    difference: Difference | None = None


@dataclass(frozen=True)
class SetTable:
    """One set: cells by run and metric (absent: not evaluated), and how many rows and seeds each run has.

    `better` is `higher`, `lower` or empty, by metric; `titles` are the metrics' names for people.
    """

    name: str
    metrics: tuple[str, ...]
    units: Mapping[str, str]
    better: Mapping[str, str]
    titles: Mapping[str, str]
    cells: Mapping[str, Mapping[str, Cell]]
    counts: Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class Comparison:
    """All there is to say about some runs; notes are sentences about what could not be compared."""

    runs: tuple[str, ...]
    baseline: str
    sets: tuple[SetTable, ...]
    costs: Mapping[str, Cost]
    notes: tuple[str, ...]
    resamples: int = RESAMPLES
    seed: int = SEED


def compare(
    runs: Sequence[Run], baseline: str, *, metrics: Sequence[str] = FIRST, resamples: int = RESAMPLES, seed: int = SEED
) -> Comparison:
    """Compare runs, the baseline among them, on every set that any of them was evaluated on.

    `metrics` may be `("all",)`; a set that has none of the default ones is compared by all it has. Raises SettingsError
    when no run has scores, or none has a metric that is asked for.
    """
    names = list(dict.fromkeys(name for run in runs for name in run.evaluations))
    if not names:
        told = ", ".join(run.name for run in runs)
        raise SettingsError([f"{told}: no scores yet; evaluate first: dpkd eval --model RUN --data FILE"])
    known = ordered(metric for run in runs for one in run.evaluations.values() for metric in one.metrics)
    wanted = known if tuple(metrics) in (("all",), FIRST) else [metric for metric in metrics if metric in known]
    unknown = [metric for metric in metrics if metric not in known and metric not in (*FIRST, "all")]
    if unknown or not wanted:
        missing = ", ".join(unknown or metrics)
        raise SettingsError([f"--metrics {missing}: not among the scores of these runs ({', '.join(known)})"])
    base = next(run for run in runs if run.name == baseline)
    notes: list[str] = []
    by_default = tuple(metrics) == FIRST
    tables = [
        _table(name, runs, base, _shown(name, runs) if by_default else wanted, notes, resamples, seed) for name in names
    ]
    costs = {run.name: run.cost for run in runs}
    return Comparison(
        tuple(run.name for run in runs), baseline, tuple(tables), costs, tuple(dict.fromkeys(notes)), resamples, seed
    )


def _shown(name: str, runs: Sequence[Run]) -> list[str]:
    """What the papers report, of a set; all that a benchmark has."""
    return ordered(m for run in runs if name in run.evaluations for m in run.evaluations[name].shown(FIRST))


def _table(
    name: str, runs: Sequence[Run], base: Run, wanted: Sequence[str], notes: list[str], resamples: int, seed: int
) -> SetTable:
    scored = {run.name: run.evaluations[name] for run in runs if name in run.evaluations}
    rows = {run: row_scores(one) for run, one in scored.items()}
    _check_alike(name, scored, notes)
    cells: dict[str, dict[str, Cell]] = {}
    for run, one in scored.items():
        cells[run] = {}
        for metric in wanted:
            mean = finite(one.metrics.get(metric, {}).get("mean"))
            if mean is None:
                continue
            against = None
            if run != base.name and base.name in scored:
                against = _difference(name, metric, run, rows[run], rows[base.name], notes, resamples, seed)
            cells[run][metric] = Cell(mean, finite(one.metrics[metric].get("sd")), against)
    _correct(cells, wanted)
    if base.name not in scored:
        notes.append(f"{name}: the baseline {base.name} was not evaluated on it; nothing is tested")
    shown = tuple(metric for metric in wanted if any(metric in own for own in cells.values()))
    units = {metric: unit for one in scored.values() for metric, unit in one.scores.get("units", {}).items()}
    counts = {run: (int(one.scores.get("rows", 0)), len(one.scores.get("seeds", []))) for run, one in scored.items()}
    better = {metric: better_of(metric, scored.values()) for metric in shown}
    titles = {metric: title_of(metric, scored.values()) for metric in shown}
    return SetTable(name, shown, units, better, titles, cells, counts)


def _correct(cells: dict[str, dict[str, Cell]], metrics: Sequence[str]) -> None:
    """Correct the p-values of each metric for the number of runs that are tested by it."""
    for metric in metrics:
        found = {r: d for r, own in cells.items() if metric in own and (d := own[metric].difference) is not None}
        for (run, difference), p in zip(found.items(), holm([d.p for d in found.values()]), strict=True):
            cells[run][metric] = replace(cells[run][metric], difference=replace(difference, corrected=p))


def _check_alike(name: str, scored: Mapping[str, Scored], notes: list[str]) -> None:
    """Say where runs were not measured alike."""
    scores = [one.scores for one in scored.values()]
    told: dict[str, list[Any]] = {
        "on different data; the numbers do not compare": [s.get("data", {}).get("fingerprint") for s in scores],
        "with different generation settings; the numbers do not compare": [s.get("generation") for s in scores],
        "with different seeds": [s.get("seeds") for s in scores],
    }
    for what, values in told.items():
        if any(value != values[0] for value in values):
            notes.append(f"{name}: the runs were evaluated {what}")


def row_scores(scored: Scored) -> dict[str, dict[str, float]]:
    """By metric and id of the row: the score, averaged over seeds."""
    found: dict[str, dict[str, list[float]]] = {}
    for own in scored.predictions().values():
        for index, row in enumerate(own):
            values: Mapping[str, Any] = row.get("scores", {})
            for metric, value in values.items():
                if (number := finite(value)) is not None:
                    found.setdefault(metric, {}).setdefault(str(row.get("id", index)), []).append(number)
    return {metric: {key: statistics.fmean(v) for key, v in own.items()} for metric, own in found.items()}


def _difference(
    name: str,
    metric: str,
    run: str,
    ours: Mapping[str, Mapping[str, float]],
    theirs: Mapping[str, Mapping[str, float]],
    notes: list[str],
    resamples: int,
    seed: int,
) -> Difference | None:
    """None where a metric has no scores of rows, or the two were not scored on the same rows."""
    mine, base = ours.get(metric), theirs.get(metric)
    if mine is None or base is None:
        return None
    if set(mine) != set(base):
        notes.append(f"{name}: {run} and the baseline were scored on different rows; nothing is tested")
        return None
    keys = sorted(mine)
    return paired_bootstrap([mine[k] for k in keys], [base[k] for k in keys], resamples=resamples, seed=seed)
