"""Runs that differ in their seed alone, as one: means over them, and the spread between them."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

from dpkd.report.names import finite
from dpkd.report.reading import Cost, MetricValues, PredictionRow, Run, Scored, Scores

# Settings that two runs with different seeds do not share, and that change nothing in what a run is.
_OWN = ("seed", "output")


@dataclass(frozen=True)
class PooledScores(Scored):
    """One set, as all the members were evaluated on it."""

    members: tuple[Scored, ...] = ()

    def predictions(self) -> dict[int, list[PredictionRow]]:
        """The answers of all members, numbered anew: a row's score is the mean over all of them."""
        answers = [rows for member in self.members for rows in member.predictions().values()]
        return dict(enumerate(answers))


@dataclass(frozen=True)
class PooledRun(Run):
    """Several runs; its cost is that of one of them, on average."""

    members: tuple[Run, ...] = ()

    @property
    def cost(self) -> Cost:
        costs = [member.cost for member in self.members]
        return Cost(**{field.name: _mean(getattr(cost, field.name) for cost in costs) for field in fields(Cost)})


def by_seed(runs: Sequence[Run]) -> list[Run]:
    """The runs in their order, those of equal settings and different seeds as one, in the place of the first."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(_key(run), []).append(run)
    found: list[Run] = []
    for group in groups.values():
        found += [_pooled(group)] if _differ(group) else group
    return sorted(found, key=lambda run: _place(run, runs))


def _place(run: Run, runs: Sequence[Run]) -> int:
    first = run.members[0] if isinstance(run, PooledRun) else run
    return next(i for i, other in enumerate(runs) if other is first)


def _differ(group: Sequence[Run]) -> bool:
    """Whether these are several runs, each with a seed of its own."""
    seeds = {run.config.get("seed") for run in group}
    return 1 < len(group) == len(seeds)


def _key(run: Run) -> str:
    """Equal where everything but the seed is; a folder of evaluations is alone."""
    if not run.config:
        return str(run.path)
    rest = {name: value for name, value in run.config.items() if name not in _OWN}
    return json.dumps([rest, run.facts.get("data", {}).get("fingerprint"), sorted(run.evaluations)], sort_keys=True)


def _pooled(group: Sequence[Run]) -> PooledRun:
    first = group[0]
    evaluations = {name: _scores([run.evaluations[name] for run in group]) for name in first.evaluations}
    name = _name([run.name for run in group])
    return PooledRun(name, first.path, first.config, evaluations=evaluations, members=tuple(group))


def _name(names: Sequence[str]) -> str:
    """What the names begin with, and how many there are.

    >>> _name(["kd-seed1", "kd-seed22", "kd-seed3"]), _name(["a", "b"])
    ('kd (3 seeds)', 'a … b (2 seeds)')
    """
    stem = names[0][: next(i for i in range(len(names[0]) + 1) if len({name[: i + 1] for name in names}) > 1)]
    stem = stem.rstrip("-_ .").removesuffix("seed").rstrip("-_ .")
    return f"{stem or ' … '.join((names[0], names[-1]))} ({len(names)} seeds)"


def _scores(members: Sequence[Scored]) -> PooledScores:
    known = [metric for metric in members[0].metrics if all(metric in member.metrics for member in members)]
    metrics: dict[str, MetricValues] = {}
    for metric in known:
        means = [mean for member in members if (mean := finite(member.metrics[metric].get("mean"))) is not None]
        if len(means) == len(members):
            metrics[metric] = {"mean": statistics.fmean(means), "sd": statistics.stdev(means), "values": means}
    scores: Scores = {**members[0].scores, "metrics": metrics}
    return PooledScores(members[0].folder, scores, tuple(members))


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def renamed_baseline(runs: Sequence[Run], baseline: str) -> str:
    """The name of the run that the baseline is now a member of."""
    pools = [run for run in runs if isinstance(run, PooledRun)]
    return next((pool.name for pool in pools if baseline in [run.name for run in pool.members]), baseline)
