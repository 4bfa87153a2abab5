"""How long answers are, in the model's own tokens."""

from __future__ import annotations

from dpkd.api import Answers, MetricSpec, hookimpl


def _per_row(answers: Answers) -> list[float]:
    return [float(count) for count in answers.tokens]


SPEC = MetricSpec("tokens", "tokens", "", "tokens per answer, EOS included", per_row=_per_row)


@hookimpl
def dpkd_metrics() -> list[MetricSpec]:
    """This module's metric."""
    return [SPEC]
