"""The methods of a sweep in the order of a score, with intervals, and the best of them within a budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dpkd.report.bootstrap import Difference, mean_interval
from dpkd.report.comparison import compare, row_scores
from dpkd.report.experiment import Experiment
from dpkd.report.names import finite
from dpkd.report.reading import Run, Scored
from dpkd.report.seeds import PooledRun

RANKED_BY = "rouge_l"


@dataclass(frozen=True)
class Standing:
    """A scored run; higher is better.

    rank        from 1; 0 for a reference
    interval    95 %, bootstrap over rows; None where the answers are not there
    seeds       the means of several training seeds
    difference  to the baseline; p is corrected for the number of methods
    """

    run: Run
    color: int | None
    rank: int
    scored: Scored
    mean: float
    interval: tuple[float, float] | None
    seeds: tuple[float, ...] = ()
    difference: Difference | None = None


def sets_of(experiment: Experiment, *, ranked: bool) -> list[str]:
    """Names of the sets that have the score of the ranking, or of the others."""
    found = dict.fromkeys(name for run in experiment.scored for name in run.evaluations)
    having = {n for run in experiment.scored for n, one in run.evaluations.items() if RANKED_BY in one.metrics}
    return [name for name in found if (name in having) == ranked]


def standings(experiment: Experiment, name: str) -> list[Standing]:
    """References, then the methods, best first, on the set of a name."""
    references = [_standing(run, None, name) for run in experiment.references]
    methods = [_standing(run, color, name) for color, run in enumerate(experiment.methods)]
    order = sorted([one for one in methods if one is not None], key=lambda one: -one.mean)
    differences = _differences(experiment, [one.run for one in order], name)
    ranked = [
        Standing(one.run, one.color, rank, one.scored, one.mean, one.interval, one.seeds, differences.get(one.run.name))
        for rank, one in enumerate(order, start=1)
    ]
    return [one for one in references if one is not None] + ranked


def _standing(run: Run, color: int | None, name: str) -> Standing | None:
    scored = run.evaluations.get(name)
    found = scored.metrics.get(RANKED_BY) if scored is not None else None
    mean = finite(found.get("mean")) if found is not None else None
    if scored is None or found is None or mean is None:
        return None
    rows = row_scores(scored).get(RANKED_BY, {})
    seeds = tuple(found.get("values", ())) if isinstance(run, PooledRun) else ()
    return Standing(run, color, 0, scored, mean, mean_interval(list(rows.values())), seeds)


def _differences(experiment: Experiment, runs: Sequence[Run], name: str) -> dict[str, Difference]:
    base = [run for run in experiment.references if run.name == experiment.baseline and name in run.evaluations]
    if experiment.baseline not in [run.name for run in (*base, *runs)]:
        return {}
    found = compare([*base, *runs], experiment.baseline, metrics=(RANKED_BY,))
    cells = next(table.cells for table in found.sets if table.name == name)
    found_by = {run: own[RANKED_BY].difference for run, own in cells.items() if RANKED_BY in own}
    return {run: difference for run, difference in found_by.items() if difference is not None}


def front(costs: Sequence[float], scores: Sequence[float]) -> list[int]:
    """The cheapest first: each that scores more than all that cost as much or less.

    >>> front([3.0, 1.0, 2.0, 1.0], [7.0, 5.0, 4.0, 6.0])
    [3, 0]
    """
    found: list[int] = []
    for index in sorted(range(len(costs)), key=lambda i: (costs[i], -scores[i])):
        if not found or scores[index] > scores[found[-1]]:
            found.append(index)
    return found
