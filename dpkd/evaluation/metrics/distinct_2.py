"""Variety of pairs of words (Li et al. 2016)."""

from __future__ import annotations

from dpkd.api import Answers, MetricSpec, hookimpl
from dpkd.evaluation.text_metrics import distinct


def _overall(answers: Answers) -> float | None:
    share = distinct((prediction.lower().split() for prediction in answers.predictions), 2)
    return None if share is None else 100 * share


SPEC = MetricSpec("distinct_2", "%", "", "different pairs of neighbouring words among all of them", overall=_overall)


@hookimpl
def dpkd_metrics() -> list[MetricSpec]:
    """This module's metric."""
    return [SPEC]
