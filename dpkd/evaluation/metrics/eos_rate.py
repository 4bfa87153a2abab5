"""How often the model ends its answer by itself."""

from __future__ import annotations

from dpkd.api import Answers, MetricSpec, hookimpl


def _per_row(answers: Answers) -> list[float]:
    return [0.0 if truncated else 100.0 for truncated in answers.truncated]


SPEC = MetricSpec("eos_rate", "%", "higher", "answers that end with EOS before the length limit", per_row=_per_row)


@hookimpl
def dpkd_metrics() -> list[MetricSpec]:
    """This module's metric."""
    return [SPEC]
