"""A sweep as one experiment: the methods that compete, the models they come from, what was chosen, what is missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, with_config
from typing_extensions import TypedDict

from dpkd.errors import SettingsError
from dpkd.report.reading import Run, read_json, read_runs
from dpkd.report.seeds import PooledRun, by_seed, renamed_baseline
from dpkd.run_folder import RunFolder, SweepFolder


@with_config(ConfigDict(extra="allow"))
class ListedRun(TypedDict, total=False):
    """A run in sweep.json."""

    name: str
    stage: str
    scored: bool
    state: str
    reason: str


@with_config(ConfigDict(extra="allow"))
class SweepRecord(TypedDict, total=False):
    """sweep.json."""

    runs: list[ListedRun]


@with_config(ConfigDict(extra="allow"))
class StageChoice(TypedDict, total=False):
    """A stage in choices.json: its best run by a metric of the dev rows, and the values of all that were tried."""

    metric: str
    chosen: dict[str, Any]
    run: str
    values: dict[str, float]


@dataclass(frozen=True)
class Experiment:
    """A sweep's folder.

    methods     the runs that are compared, those that differ in their seed alone as one; each has a color of its own
    references  runs that others take their teacher or their start from
    tried       runs that only decided a setting, by name
    choices     what they decided, by stage
    missing     runs of the sweep that did not finish, or were not scored, with the reason
    baseline    name of the method, or reference, that the methods are tested against
    """

    path: Path
    methods: Sequence[Run]
    references: Sequence[Run]
    tried: Mapping[str, Run]
    choices: Mapping[str, StageChoice]
    missing: Sequence[ListedRun]
    baseline: str

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def members(self) -> list[tuple[Run, int]]:
        """Each run of each method, with the method's color."""
        return [(run, color) for color, method in enumerate(self.methods) for run in members(method)]

    @property
    def scored(self) -> list[Run]:
        """All that have scores, references first."""
        return [run for run in (*self.references, *self.methods) if run.evaluations]


def members(method: Run) -> tuple[Run, ...]:
    """The runs of a method: one for each seed."""
    return method.members if isinstance(method, PooledRun) else (method,)


def is_sweep(path: Path) -> bool:
    """Whether a folder holds runs and is none itself."""
    return not RunFolder(path).config.is_file() and any(path.glob("*/config.resolved.yaml"))


def read_experiment(path: Path, baseline: Path | None = None) -> Experiment:
    """Read a sweep's folder, or any folder of runs. The baseline is a run in it; None: the first SFT run, or the first.

    Raises DpkdError when a file is damaged, and SettingsError when the baseline is none of the runs that are compared.
    """
    folder = SweepFolder(path)
    listed = (read_json(folder.record, SweepRecord) or {}).get("runs", [])
    choices = read_json(folder.choices, dict[str, StageChoice]) or {}
    order = {row["name"]: place for place, row in enumerate(listed)}
    runs = sorted(read_runs([path]), key=lambda run: order.get(run.name, len(order)))
    blocks = [block for run in runs for block in (run.config.get("teacher"), run.config.get("student"))]
    used = {name for block in blocks if (name := _run_of(block))}
    tried = {run.name: run for run in runs if any(run.name in c.get("values", {}) for c in choices.values())}
    missing = _missing(listed, runs)
    aside = used | set(tried) | {row["name"] for row in missing}
    competing = [run for run in runs if run.name not in aside]
    references = [run for run in runs if run.name in used]
    methods = by_seed(competing)
    shown = _shortened(methods)
    names = {method.name: short.name for method, short in zip(methods, shown, strict=True)}
    base = _baseline(methods, references, baseline)
    return Experiment(path, shown, references, tried, choices, missing, names.get(base, base))


def _run_of(block: Mapping[str, Any] | None) -> str | None:
    """The name of the run in whose folder a model is; the sweep's folder may have moved since."""
    path = Path(str((block or {}).get("model") or ""))
    return path.parent.name if path.name == "model" else None


def _shortened(methods: Sequence[Run]) -> list[Run]:
    """Without the seeds in a name, where the names differ without them."""
    names = [
        method.name.removesuffix(f"-seed_{method.config.get('seed')}").removesuffix(f" ({len(members(method))} seeds)")
        for method in methods
    ]
    return [
        replace(method, name=name) if names.count(name) == 1 else method
        for method, name in zip(methods, names, strict=True)
    ]


def _missing(listed: Sequence[ListedRun], runs: Sequence[Run]) -> list[ListedRun]:
    """Also what was removed, or not scored, since the sweep said that it was finished."""
    found = {run.name: run for run in runs}
    missing = []
    for row in listed:
        run = found.get(row["name"])
        if row.get("state") != "finished":
            missing.append(row)
        elif run is None:
            missing.append({**row, "state": "no folder", "reason": "removed since the sweep finished it"})
        elif row.get("scored") and not run.evaluations:
            missing.append({**row, "state": "not scored", "reason": "no eval/SET/scores.json"})
    return missing


def _baseline(methods: Sequence[Run], references: Sequence[Run], asked: Path | None) -> str:
    if asked is not None:
        name = renamed_baseline(methods, asked.name)
        if name not in [run.name for run in (*methods, *references)]:
            told = ", ".join(run.name for method in (*references, *methods) for run in members(method))
            raise SettingsError([f"--baseline {asked}: not among the models that are compared ({told})"])
        return name
    scored = [method for method in methods if method.evaluations] or list(methods)
    return next((method.name for method in scored if method.loss == "sft"), scored[0].name if scored else "")
