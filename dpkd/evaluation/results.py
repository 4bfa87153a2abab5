"""The result of an evaluation: metrics with mean and spread over seeds, by length too, and their file."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpkd.api import Answers, MetricSpec, TokenScores
from dpkd.errors import DpkdError
from dpkd.evaluation.lengths import DEFAULT_CUTS, WORDS, LengthMeasure, bucket_labels, bucket_of
from dpkd.evaluation.predictions import TEACHER
from dpkd.io import digest, dumps, sha256, write_json

FORMAT = 2


@dataclass(frozen=True)
class Metric:
    """One value per seed (a single one where seeds play no part), with the labels of its MetricSpec."""

    values: tuple[float, ...]
    unit: str = ""
    better: str = ""
    title: str = ""
    summary: str = ""

    @classmethod
    def of(cls, spec: MetricSpec, values: Sequence[float]) -> Metric:
        """Values of the metric of a spec."""
        return cls(tuple(values), spec.unit, spec.better, spec.title, spec.summary)

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def sd(self) -> float | None:
        """Sample standard deviation over seeds; None for one seed."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    def as_dict(self) -> dict[str, Any]:
        return {"mean": self.mean, "sd": self.sd, "values": list(self.values)}


@dataclass(frozen=True)
class Bucket:
    """The rows whose first reference has a length in `label`."""

    label: str
    rows: int
    metrics: Mapping[str, Metric]


@dataclass(frozen=True)
class Evaluation(Mapping[str, float]):
    """Scores of one model on one set; `rows` were to be scored, and every one of them was, under each seed.

    As a mapping, the means of the metrics by their names.
    """

    rows: int
    seeds: tuple[int, ...]
    metrics: Mapping[str, Metric]
    buckets: tuple[Bucket, ...] = ()
    length_unit: str = WORDS.unit
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> float:
        """The mean of a metric."""
        return self.metrics[name].mean

    def __iter__(self) -> Iterator[str]:
        return iter(self.metrics)

    def __len__(self) -> int:
        return len(self.metrics)

    def __repr__(self) -> str:
        means = ", ".join(f"{name}={metric.mean:.4g}" for name, metric in self.metrics.items())
        return f"Evaluation(rows={self.rows}, seeds={self.seeds}: {means})"

    def as_dict(self) -> dict[str, Any]:
        """For scores.json."""
        return {
            "format": FORMAT,
            "rows": self.rows,
            "seeds": list(self.seeds),
            "metrics": {name: metric.as_dict() for name, metric in self.metrics.items()},
            "units": {name: metric.unit for name, metric in self.metrics.items()},
            "better": {name: metric.better for name, metric in self.metrics.items()},
            "titles": {name: metric.title for name, metric in self.metrics.items()},
            "lengths": {
                "unit": self.length_unit,
                "buckets": [
                    {"label": b.label, "rows": b.rows, "metrics": {n: m.as_dict() for n, m in b.metrics.items()}}
                    for b in self.buckets
                ],
            },
            **self.facts,
        }


def score(
    answers: Mapping[int, Answers],
    specs: Mapping[str, MetricSpec],
    *,
    cuts: Sequence[int] = DEFAULT_CUTS,
    measure: LengthMeasure = WORDS,
) -> tuple[dict[str, Metric], tuple[Bucket, ...], dict[int, list[dict[str, float]]]]:
    """Metrics of answers over seeds, those of rows again by length of the first reference, and the rows' own values.

    Raises DpkdError when a metric does not give one value per row.
    """
    first = [name for name in ("rouge_l", "exact_match") if name in specs]  # what the papers report
    specs = {name: specs[name] for name in [*first, *specs] if specs[name].of_tokens is None}
    rows: dict[int, list[dict[str, float]]] = {seed: [{} for _ in own.predictions] for seed, own in answers.items()}
    values: dict[str, list[float]] = {}
    for name, spec in specs.items():
        for seed, own in answers.items():
            found = _overall(spec, own) if spec.overall is not None else _of_rows(spec, own, rows[seed])
            if found is not None:
                values.setdefault(name, []).append(found)
    metrics = {name: Metric.of(specs[name], found) for name, found in values.items()}
    return metrics, _buckets(answers, rows, specs, cuts, measure), rows


def score_tokens(scores: TokenScores, specs: Mapping[str, MetricSpec]) -> dict[str, Metric]:
    """The metrics of given responses: likelihood, divergences, rewards; without those that need an absent teacher."""
    found = {name: spec.of_tokens(scores) for name, spec in specs.items() if spec.of_tokens is not None}
    return {name: Metric.of(specs[name], [value]) for name, value in found.items() if value is not None}


def check_finite(metrics: Mapping[str, Metric]) -> None:
    """Raises DpkdError when a metric is NaN or infinite: scores.json holds numbers only."""
    bad = [name for name, metric in metrics.items() if not all(map(math.isfinite, metric.values))]
    if bad:
        raise DpkdError(f"not finite: {', '.join(bad)}; no scores are written. Check the weights of model and teacher")


def _overall(spec: MetricSpec, answers: Answers) -> float | None:
    assert spec.overall is not None
    return spec.overall(answers)


def _of_rows(spec: MetricSpec, answers: Answers, rows: list[dict[str, float]]) -> float | None:
    """The mean over rows; each row's value is noted in `rows`."""
    assert spec.per_row is not None
    found = list(spec.per_row(answers))
    if len(found) != len(rows):
        raise DpkdError(f"the metric {spec.name} gave {len(found)} values for {len(rows)} rows: no score is given")
    for row, value in zip(rows, found, strict=True):
        if value is not None:
            row[spec.name] = float(value)
    known = [value for value in found if value is not None]
    return statistics.fmean(known) if known else None


def _buckets(
    answers: Mapping[int, Answers],
    rows: Mapping[int, list[dict[str, float]]],
    specs: Mapping[str, MetricSpec],
    cuts: Sequence[int],
    measure: LengthMeasure,
) -> tuple[Bucket, ...]:
    if not cuts:
        return ()
    references = next(iter(answers.values())).references
    place = [bucket_of(measure.count(wanted[0]), cuts) for wanted in references]
    buckets = []
    for number, label in enumerate(bucket_labels(cuts)):
        inside = [i for i, own in enumerate(place) if own == number]
        metrics = {}
        for name, spec in specs.items():
            means = [_mean([own[i][name] for i in inside if name in own[i]]) for own in rows.values()]
            if spec.per_row is not None and all(mean is not None for mean in means):
                metrics[name] = Metric.of(spec, [mean for mean in means if mean is not None])
        buckets.append(Bucket(label, len(inside), metrics))
    if sum(bucket.rows for bucket in buckets) != len(references):
        raise DpkdError(f"{len(references)} rows were scored, but {sum(b.rows for b in buckets)} are in a bucket")
    return tuple(buckets)


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def write_scores(evaluation: Evaluation, folder: Path) -> Path:
    """Write scores.json, whole or not at all, with its own checksum and those of the answers that were scored."""
    answers = [place / f"predictions-{seed}.jsonl" for place in (folder, folder / TEACHER) for seed in evaluation.seeds]
    files = {file.relative_to(folder).as_posix(): sha256(file) for file in answers if file.is_file()}
    scores = json.loads(dumps(evaluation.as_dict() | {"files": files}))  # as it will be read
    return write_json(folder / "scores.json", scores | {"check": digest(scores)})
