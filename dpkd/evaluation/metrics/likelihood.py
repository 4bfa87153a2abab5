"""Likelihood of the references under the model, and under its teacher."""

from __future__ import annotations

import math

from dpkd.api import MetricSpec, TokenScores, hookimpl

NATS = "nats per response token"


def _nll(scores: TokenScores) -> float:
    return -float(scores.logq_N.mean())


def _perplexity(scores: TokenScores) -> float:
    return math.exp(min(_nll(scores), 700.0))


def _bits_per_byte(scores: TokenScores) -> float | None:
    return -float(scores.logq_N.sum()) / math.log(2) / scores.text_bytes if scores.text_bytes else None


def _teacher_nll(scores: TokenScores) -> float | None:
    return None if scores.logp_N is None else -float(scores.logp_N.mean())


SPECS = [
    MetricSpec("nll", NATS, "lower", "−log q of the references", of_tokens=_nll, title="NLL"),
    MetricSpec("perplexity", "per response token", "lower", "exp of the NLL", of_tokens=_perplexity),
    MetricSpec("bits_per_byte", "bits per byte", "lower", "NLL by the bytes of the text", of_tokens=_bits_per_byte),
    MetricSpec("teacher_nll", NATS, "", "−log p of the references", of_tokens=_teacher_nll, title="NLL of the teacher"),
]


@hookimpl
def dpkd_metrics() -> list[MetricSpec]:
    """This module's metrics."""
    return SPECS
