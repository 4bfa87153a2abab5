"""The implicit reward log q(y|x) / p(y|x) at β = 1 (DPKD, §4.3), of whole responses."""

from __future__ import annotations

from typing import Any

import numpy as np

from dpkd.api import MetricSpec, TokenScores, hookimpl


def _rewards(scores: TokenScores) -> tuple[Any, Any] | None:
    """The reward and the tokens of each row that has a token; None without a teacher."""
    if scores.logp_N is None:
        return None
    _, rows_N, lengths = np.unique(scores.sequence_N, return_inverse=True, return_counts=True)
    return np.bincount(rows_N, weights=scores.logq_N - scores.logp_N), lengths


def _sum(scores: TokenScores) -> float | None:
    found = _rewards(scores)
    return None if found is None else float(found[0].mean())


def _mean(scores: TokenScores) -> float | None:
    found = _rewards(scores)
    return None if found is None else float((found[0] / found[1]).mean())


SPECS = [
    MetricSpec(
        "reward_sum", "nats per response", "", "log q/p of the references", of_tokens=_sum, title="implicit reward, sum"
    ),
    MetricSpec(
        "reward_mean",
        "nats per token of a response",
        "",
        "log q/p of the references, per token",
        of_tokens=_mean,
        title="implicit reward, per token",
    ),
]


@hookimpl
def dpkd_metrics() -> list[MetricSpec]:
    """This module's metrics."""
    return SPECS
