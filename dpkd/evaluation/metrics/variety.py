"""How varied answers are (Li et al. 2016), and how much they repeat themselves (Welleck et al. 2020)."""

from __future__ import annotations

from dpkd.api import Answers, MetricSpec, hookimpl
from dpkd.evaluation.text_metrics import distinct, repetition


def _distinct(answers: Answers, n: int) -> float | None:
    share = distinct((prediction.lower().split() for prediction in answers.predictions), n)
    return None if share is None else 100 * share


def _repeated(answers: Answers) -> list[float | None]:
    shares = (repetition(prediction.lower().split()) for prediction in answers.predictions)
    return [None if share is None else 100 * share for share in shares]


SPECS = [
    MetricSpec(
        "repetition",
        "%",
        "lower",
        "4-grams that occur earlier in the answer",
        per_row=_repeated,
        title="repeated 4-grams",
    ),
    MetricSpec(
        "distinct_1", "%", "", "distinct words among all words", overall=lambda a: _distinct(a, 1), title="distinct-1"
    ),
    MetricSpec(
        "distinct_2",
        "%",
        "",
        "distinct pairs of words among all",
        overall=lambda a: _distinct(a, 2),
        title="distinct-2",
    ),
]


@hookimpl
def dpkd_metrics() -> list[MetricSpec]:
    """This module's metrics."""
    return SPECS
