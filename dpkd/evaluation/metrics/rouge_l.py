"""Rouge-L as the papers compute it."""

from __future__ import annotations

from dpkd.api import Answers, MetricSpec, hookimpl
from dpkd.evaluation.text_metrics import RougeL


def _per_row(answers: Answers) -> list[float]:
    rouge = RougeL()
    rows = zip(answers.predictions, answers.references, strict=True)
    return [100 * rouge(prediction, references) for prediction, references in rows]


SPEC = MetricSpec(
    "rouge_l",
    "× 100",
    "higher",
    "rouge-score's rougeL F with stemming, best over references",
    per_row=_per_row,
    title="Rouge-L",
)


@hookimpl
def dpkd_metrics() -> list[MetricSpec]:
    """This module's metric."""
    return [SPEC]
