"""How long answers are."""

from __future__ import annotations

from dpkd.api import Answers, MetricSpec, hookimpl
from dpkd.evaluation.lengths import word_count


def _per_row(answers: Answers) -> list[float]:
    return [float(word_count(prediction)) for prediction in answers.predictions]


SPEC = MetricSpec("words", "words", "", "white-space words per answer", per_row=_per_row)


@hookimpl
def dpkd_metrics() -> list[MetricSpec]:
    """This module's metric."""
    return [SPEC]
