"""Exact match as the papers compute it."""

from __future__ import annotations

from dpkd.api import Answers, MetricSpec, hookimpl
from dpkd.evaluation.text_metrics import exact_match


def _per_row(answers: Answers) -> list[float]:
    rows = zip(answers.predictions, answers.references, strict=True)
    return [100.0 * exact_match(prediction, references) for prediction, references in rows]


SPEC = MetricSpec("exact_match", "%", "higher", "lower case, without punctuation, white space folded", per_row=_per_row)


@hookimpl
def dpkd_metrics() -> list[MetricSpec]:
    """This module's metric."""
    return [SPEC]
