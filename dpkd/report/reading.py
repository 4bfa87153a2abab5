"""What a report knows of a run: everything that its folder says, read once. No model is loaded.

A folder of evaluations alone (`runs/eval/MODEL`, written for a model that is no run) is a run without training.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dpkd.config.write import read_sources
from dpkd.errors import DpkdError
from dpkd.io import JsonLog
from dpkd.report.names import better_by_name
from dpkd.run_folder import RunFolder
from dpkd.run_metrics import read_metrics


@dataclass(frozen=True)
class Cost:
    """What training took: seconds of training steps, response tokens trained on, and the peak of memory in MiB."""

    seconds: float | None = None
    tokens: float | None = None
    peak_memory_mib: float | None = None


@dataclass(frozen=True)
class Scored:
    """One evaluation: a `scores.json` and the folder with the answers."""

    folder: Path
    scores: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The set's name."""
        return str(self.scores.get("set", self.folder.name))

    @property
    def metrics(self) -> Mapping[str, Mapping[str, Any]]:
        """By name: `mean`, `sd` (None for one seed) and `values`."""
        return self.scores.get("metrics", {})  # type: ignore[no-any-return]

    def better(self, metric: str) -> str:
        """`higher`, `lower`, or empty: as its scores say, or by its name where they are older and do not."""
        told: Mapping[str, str] = self.scores.get("better", {})
        return told.get(metric, better_by_name(metric))

    def predictions(self) -> dict[int, list[dict[str, Any]]]:
        """The rows of each seed, in the order of the data; empty where the files are not there."""
        found = {seed: self.folder / f"predictions-{seed}.jsonl" for seed in self.scores.get("seeds", [])}
        return {seed: JsonLog(path).rows() for seed, path in found.items() if path.is_file()}


def better_of(metric: str, scored: Iterable[Scored]) -> str:
    """Which direction is better, by all that have the metric; empty where they do not agree."""
    told = {one.better(metric) for one in scored if metric in one.metrics}
    return told.pop() if len(told) == 1 else ""


@dataclass(frozen=True)
class Run:
    """A run, as its folder tells it.

    config      the settings, as nested values; `sources` says where those come from that are no defaults
    facts       run.json
    metrics     metrics.jsonl; dev: dev.jsonl, both with `step` in every line
    samples     samples.jsonl
    evaluations by name of the set
    rewards     token_rewards.json: answers with a reward for each token
    """

    name: str
    path: Path
    config: Mapping[str, Any] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    metrics: Sequence[Mapping[str, Any]] = ()
    dev: Sequence[Mapping[str, Any]] = ()
    samples: Sequence[Mapping[str, Any]] = ()
    evaluations: Mapping[str, Scored] = field(default_factory=dict)
    rewards: Sequence[Mapping[str, Any]] = ()

    @property
    def loss(self) -> str | None:
        """Name of the loss; None for a model that is no run."""
        return self.config.get("loss", {}).get("name")  # type: ignore[no-any-return]

    @property
    def cost(self) -> Cost:
        """Summed over the logged windows, which follow one another without a gap."""
        timed = [row for row in self.metrics if isinstance(row.get("seconds"), int | float)]
        if not timed:
            return Cost()
        peaks = [row["peak_memory_mib"] for row in timed if "peak_memory_mib" in row]
        tokens = sum(row.get("tokens_per_second", 0.0) * row["seconds"] for row in timed)
        return Cost(sum(row["seconds"] for row in timed), tokens, max(peaks, default=None))


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Several runs, each with a name of its own: the folder's, or the path where two folders have one name.

    Raises DpkdError for what is no run, and when a run is named twice.
    """
    resolved = [path.resolve() for path in paths]
    twice = {str(path) for path, real in zip(paths, resolved, strict=True) if resolved.count(real) > 1}
    if twice:
        raise DpkdError(f"{', '.join(sorted(twice))} is named twice; name each run once")
    names = [real.name for real in resolved]
    return [
        read_run(path, name if names.count(name) == 1 else str(path)) for path, name in zip(paths, names, strict=True)
    ]


def read_run(path: Path, name: str | None = None) -> Run:
    """A run folder, or a folder of evaluations. Raises DpkdError when it is neither, or a file in it is damaged."""
    folder = RunFolder(path)
    name = name or path.resolve().name
    if not folder.config.is_file():
        alone = read_evaluations(path)
        if not alone:
            raise DpkdError(
                f"{path} is neither a run folder (it has no config.resolved.yaml) nor a folder of evaluations "
                "(SET/scores.json). Name what `dpkd train --output` or `dpkd eval` wrote, such as runs/kd-1."
            )
        return Run(name, path, evaluations=alone)
    text = folder.config.read_text(encoding="utf-8")
    dev = path / "dev.jsonl"
    return Run(
        name,
        path,
        config=yaml.safe_load(text) or {},
        sources=read_sources(text),
        facts=_json(folder.facts, {}),
        metrics=read_metrics(folder.metrics) if folder.metrics.is_file() else [],
        dev=read_metrics(dev) if dev.is_file() else [],
        samples=JsonLog(folder.samples).rows(),
        evaluations=read_evaluations(path / "eval"),
        rewards=_json(path / "token_rewards.json", []),
    )


def read_evaluations(folder: Path) -> dict[str, Scored]:
    """The evaluations in a folder, by name of the set, in the order of their names."""
    found = [Scored(path.parent, _json(path, {})) for path in sorted(folder.glob("*/scores.json"))]
    return {one.name: one for one in found}


def _json(path: Path, default: Any) -> Any:
    if not path.is_file():
        return default
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DpkdError(f"{path}: expected JSON ({error}); write it anew, or remove it to go on without it") from error
