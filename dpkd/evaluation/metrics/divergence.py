"""Divergence between teacher and student on the references, over the whole vocabulary."""

from __future__ import annotations

from typing import Any

import numpy as np

from dpkd.api import MetricSpec, TokenScores, hookimpl

NATS = "nats per response token"
FIRST = "nats at the first token"


def _mean(values_N: Any) -> float | None:
    return None if values_N is None else float(values_N.mean())


def _at_first(values_N: Any, sequence_N: Any) -> float | None:
    """The mean over rows of the value at each row's first token (DPKD, Table 3)."""
    first_N = np.diff(sequence_N, prepend=-1) > 0
    return None if values_N is None else float(values_N[first_N].mean())


def _first_forward(scores: TokenScores) -> float | None:
    return _at_first(scores.forward_kl_N, scores.sequence_N)


def _first_reverse(scores: TokenScores) -> float | None:
    return _at_first(scores.reverse_kl_N, scores.sequence_N)


SPECS = [
    MetricSpec(
        "forward_kl",
        NATS,
        "lower",
        "KL(teacher‖student)",
        of_tokens=lambda scores: _mean(scores.forward_kl_N),
        title="forward KL",
    ),
    MetricSpec(
        "reverse_kl",
        NATS,
        "lower",
        "KL(student‖teacher)",
        of_tokens=lambda scores: _mean(scores.reverse_kl_N),
        title="reverse KL",
    ),
    MetricSpec(
        "first_token_forward_kl",
        FIRST,
        "lower",
        "KL(teacher‖student) at the first token",
        of_tokens=_first_forward,
        title="first-token forward KL",
    ),
    MetricSpec(
        "first_token_reverse_kl",
        FIRST,
        "lower",
        "KL(student‖teacher) at the first token",
        of_tokens=_first_reverse,
        title="first-token reverse KL",
    ),
]


@hookimpl
def dpkd_metrics() -> list[MetricSpec]:
    """This module's metrics."""
    return SPECS
