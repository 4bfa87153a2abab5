"""How much an answer repeats itself (Welleck et al. 2020)."""

from __future__ import annotations

from dpkd.api import Answers, MetricSpec, hookimpl
from dpkd.evaluation.text_metrics import repetition


def _per_row(answers: Answers) -> list[float | None]:
    shares = (repetition(prediction.lower().split()) for prediction in answers.predictions)
    return [None if share is None else 100 * share for share in shares]


SPEC = MetricSpec("repetition", "%", "lower", "4-grams that the answer has said before", per_row=_per_row)


@hookimpl
def dpkd_metrics() -> list[MetricSpec]:
    """This module's metric."""
    return [SPEC]
