"""What a report knows of a run: everything in its folder, read and checked once. No model is loaded.

A folder of evaluations alone (`runs/eval/MODEL`, written for a model that is no run), or of one (`dpkd eval --output`),
is a run without training.
"""

from __future__ import annotations

import json
import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict

from dpkd.config.write import read_sources
from dpkd.config.yaml_text import read_resolved
from dpkd.errors import DpkdError
from dpkd.evaluation.predictions import check_answers
from dpkd.io import JsonLog, digest
from dpkd.report.names import better_by_name, finite, title
from dpkd.run_folder import RunFolder
from dpkd.run_metrics import read_metrics

# Names of before the field's own: an old run folder is read as if it had the new ones.
_OLD_NAMES = {"/preferred": "/chosen", "/dispreferred": "/rejected"}
T = TypeVar("T")


# The parts of the files that reports rely on; other keys pass unchecked.


@with_config(ConfigDict(extra="allow"))
class MetricValues(TypedDict, total=False):
    """A metric in scores.json."""

    mean: float
    sd: float | None
    values: list[float]


@with_config(ConfigDict(extra="allow"))
class StoredBucket(TypedDict):
    """Rows whose reference has a length in `label`."""

    label: str
    rows: int
    metrics: dict[str, MetricValues]


@with_config(ConfigDict(extra="allow"))
class Lengths(TypedDict, total=False):
    """Scores by length of the reference."""

    unit: str
    buckets: list[StoredBucket]


@with_config(ConfigDict(extra="allow"))
class Scores(TypedDict, total=False):
    """scores.json."""

    set: str
    rows: int
    seeds: list[int]
    greedy: bool
    metrics: dict[str, MetricValues]
    units: dict[str, str]
    better: dict[str, str]
    titles: dict[str, str]
    lengths: Lengths
    files: dict[str, str]
    data: dict[str, Any]
    generation: dict[str, Any]
    task: dict[str, Any]
    stderr: dict[str, Any]


@with_config(ConfigDict(extra="allow"))
class PredictionRow(TypedDict, total=False):
    """A line of predictions-SEED.jsonl."""

    references: list[str]
    scores: dict[str, Any]
    ids: list[int]


@with_config(ConfigDict(extra="allow"))
class SampleRow(TypedDict, total=False):
    """A line of samples.jsonl."""

    step: int
    responses: list[dict[str, Any]]


@with_config(ConfigDict(extra="allow"))
class TokenRewards(TypedDict, total=False):
    """An answer in token_rewards.json."""

    tokens: list[dict[str, Any]]


@with_config(ConfigDict(extra="allow"))
class DataFacts(TypedDict, total=False):
    """What run.json says of the data."""

    path: str
    kept: int
    examples: int
    skipped: dict[str, int]
    dropped: dict[str, int]


@with_config(ConfigDict(extra="allow"))
class Facts(TypedDict, total=False):
    """run.json."""

    steps: int
    command: list[str]
    versions: dict[str, Any]
    parameters: dict[str, Any]
    machine: dict[str, Any]
    data: DataFacts


@with_config(ConfigDict(extra="allow"))
class Config(TypedDict, total=False):
    """config.resolved.yaml."""

    loss: dict[str, Any]
    teacher: dict[str, Any] | None
    student: dict[str, Any]
    data: dict[str, Any]


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
    scores: Scores

    @property
    def name(self) -> str:
        """The set's name."""
        return self.scores.get("set", self.folder.name)

    @property
    def metrics(self) -> Mapping[str, MetricValues]:
        """By name: `mean`, `sd` (None for one seed) and `values`."""
        return self.scores.get("metrics", {})

    @property
    def is_benchmark(self) -> bool:
        """Whether another tool asked the questions: their texts are not in the run's template."""
        return "task" in self.scores

    def shown(self, metrics: Sequence[str]) -> list[str]:
        """Those of some metrics that it has; all its own where it has none of them, as benchmarks do."""
        return [metric for metric in metrics if metric in self.metrics] or list(self.metrics)

    def better(self, metric: str) -> str:
        """`higher`, `lower`, or empty: as its scores say, or by its name where they are older and do not."""
        return self.scores.get("better", {}).get(metric, better_by_name(metric))

    def predictions(self) -> dict[int, list[PredictionRow]]:
        """The rows of each seed, in the order of the data; empty where the files are not there."""
        found = {seed: self.folder / f"predictions-{seed}.jsonl" for seed in self.scores.get("seeds", [])}
        there = {seed: path for seed, path in found.items() if path.is_file()}
        for path in there.values():
            check_answers(path, self.scores)
        return {seed: _json_lines(path, PredictionRow) for seed, path in there.items()}


def better_of(metric: str, scored: Iterable[Scored]) -> str:
    """Which direction is better, by all that have the metric; empty where they do not agree."""
    told = {one.better(metric) for one in scored if metric in one.metrics}
    return told.pop() if len(told) == 1 else ""


def title_of(metric: str, scored: Iterable[Scored]) -> str:
    """A metric's name for people: as the scores say, else by its name."""
    return next((name for one in scored if (name := one.scores.get("titles", {}).get(metric))), title(metric))


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
    config: Config = field(default_factory=Config)
    sources: Mapping[str, str] = field(default_factory=dict)
    facts: Facts = field(default_factory=Facts)
    metrics: Sequence[Mapping[str, Any]] = ()
    dev: Sequence[Mapping[str, Any]] = ()
    samples: Sequence[SampleRow] = ()
    evaluations: Mapping[str, Scored] = field(default_factory=dict)
    rewards: Sequence[TokenRewards] = ()

    @property
    def loss(self) -> str | None:
        """Name of the loss; None for a model that is no run."""
        name = self.config.get("loss", {}).get("name")
        return None if name is None else str(name)

    @property
    def cost(self) -> Cost:
        """Summed over the logged windows, which follow one another without a gap."""
        timed = [(row, seconds) for row in self.metrics if (seconds := finite(row.get("seconds"))) is not None]
        if not timed:
            return Cost()
        peaks = [peak for row, _ in timed if (peak := finite(row.get("peak_memory_mib"))) is not None]
        trained = sum((finite(row.get("tokens_per_second")) or 0.0) * seconds for row, seconds in timed)
        return Cost(math.fsum(seconds for _, seconds in timed), trained, max(peaks, default=None))


def run_folders(paths: Sequence[Path]) -> list[Path]:
    """The folders with each sweep's folder in place of which are its runs, in the order of their names."""
    found = []
    for path in paths:
        inside = [] if _is_run(path) else [own for own in _entries(path) if (own / "config.resolved.yaml").is_file()]
        found += inside or [path]
    return found


def _is_run(path: Path) -> bool:
    return RunFolder(path).config.is_file() or bool(_score_files(path))


def _entries(path: Path) -> list[Path]:
    return sorted(entry for entry in path.iterdir() if entry.is_dir()) if path.is_dir() else []


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Several runs, each with a name of its own: the folder's, or the path where two folders have one name.

    A folder of runs, such as a sweep's, stands for all of them. Raises DpkdError for what is no run, and when a run is
    named twice.
    """
    paths = run_folders(paths)
    resolved = [path.resolve() for path in paths]
    twice = {str(path) for path, real in zip(paths, resolved, strict=True) if resolved.count(real) > 1}
    if twice:
        raise DpkdError(f"{', '.join(sorted(twice))} is named twice; name each run once")
    names = [real.name for real in resolved]
    return [
        read_run(path, name if names.count(name) == 1 else str(path)) for path, name in zip(paths, names, strict=True)
    ]


def read_run(path: Path, name: str | None = None) -> Run:
    """A run folder, or a folder of one evaluation or more. Raises DpkdError for another, or a damaged file in it."""
    folder = RunFolder(path)
    name = name or path.resolve().name
    if not folder.config.is_file():
        alone = read_evaluations(path)
        if not alone:
            raise DpkdError(
                f"{path} is neither a run folder (it has no config.resolved.yaml) nor a folder of evaluations "
                "(scores.json or SET/scores.json). Name what `dpkd train --output` or `dpkd eval` wrote, such as "
                "runs/kd-1."
            )
        return Run(name, path, evaluations=alone)
    folder.check_records()
    text = _text(folder.config)
    dev = path / "dev.jsonl"
    return Run(
        name,
        path,
        config=_checked(folder.config, Config, read_resolved(folder.config)),
        sources=read_sources(text),
        facts=read_json(folder.facts, Facts) or {},
        metrics=_metrics(folder.metrics),
        dev=_metrics(dev),
        samples=_json_lines(folder.samples, SampleRow),
        evaluations=read_evaluations(path / "eval"),
        rewards=read_json(path / "token_rewards.json", list[TokenRewards]) or [],
    )


def read_evaluations(folder: Path) -> dict[str, Scored]:
    """The evaluations in a folder, by name of the set, in the order of their names."""
    found = [Scored(path.parent, read_json(path, Scores) or {}) for path in _score_files(folder)]
    return {one.name: one for one in found}


def _score_files(folder: Path) -> list[Path]:
    """Of the folder itself, where it is that of one set, and of its sets."""
    return [*folder.glob("scores.json"), *sorted(folder.glob("*/scores.json"))]


def _metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of metrics, with the present names of metrics."""
    rows = read_metrics(path) if path.is_file() else []
    return [{_renamed(name): value for name, value in row.items()} for row in rows]


def _renamed(name: str) -> str:
    return next((name.removesuffix(old) + new for old, new in _OLD_NAMES.items() if name.endswith(old)), name)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DpkdError(f"{path}: cannot be read ({error})") from error


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    """Made once for each kind: predictions are checked row by row."""
    return TypeAdapter(kind)


def _checked(path: Path, kind: type[T], value: Any, line: str = "") -> T:
    """A value of a file once its parts are what they should be. Raises DpkdError with the first that is not."""
    try:
        checked: T = _adapter(cast(Hashable, kind)).validate_python(value)
        return checked
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        found = " ".join(repr(first["input"])[:60].split())
        what = f"{place}: {first['msg']}" if place else first["msg"]
        raise DpkdError(f"{path}{line}: damaged: {what}, found {found}; write it anew, or remove it") from None
    except RecursionError:
        raise DpkdError(f"{path}{line}: damaged: nested too deeply; write it anew, or remove it") from None


def read_json(path: Path, kind: type[T]) -> T | None:
    """A JSON file; None where it is not there."""
    if not path.is_file():
        return None
    try:
        value = json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise DpkdError(f"{path}: expected JSON ({error}); write it anew, or remove it to go on without it") from error
    check = value.pop("check", None) if isinstance(value, dict) else None
    if check is not None and check != digest(value):
        raise DpkdError(f"{path} is damaged: its checksum is wrong; write it anew, or remove it to go on without it")
    return _checked(path, kind, value)


def _json_lines(path: Path, kind: type[T]) -> list[T]:
    """A file of one JSON object a line; a torn last line, of a run that was killed, is left out."""
    rows = JsonLog(path).rows() if path.is_file() else []
    return [_checked(path, kind, row, f":{number}") for number, row in enumerate(rows, start=1)]
