"""Metrics for `dpkd eval`: of a model's answers, and of the references under model and teacher."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Answers:
    """A model's answers to the rows of a set, under one seed; all of one length, in the order of the rows.

    predictions  the answers as text, without surrounding white space
    references   the accepted answers of each row, at least one
    tokens       tokens of each answer, EOS included
    truncated    whether an answer ran into the length limit
    prompts      the prompts, as the model read them
    """

    predictions: Sequence[str]
    references: Sequence[Sequence[str]]
    tokens: Sequence[int]
    truncated: Sequence[bool]
    prompts: Sequence[str] = ()


@dataclass(frozen=True)
class TokenScores:
    """Given responses under a model and its teacher, token by token: NumPy arrays of float64, in nats.

    N is the number of response tokens of all rows together, EOS included; what needs a teacher is None without one.

    logq_N        log-probs of the tokens under the model
    sequence_N    the row that each token belongs to, counted from 0 and rising
    logp_N        log-probs under the teacher
    forward_kl_N  KL(teacher‖student) at the token, over the whole vocabulary
    reverse_kl_N  KL(student‖teacher) at the token
    text_bytes    UTF-8 bytes of all responses together
    """

    logq_N: Any
    sequence_N: Any
    logp_N: Any = None
    forward_kl_N: Any = None
    reverse_kl_N: Any = None
    text_bytes: int | None = None


@dataclass(frozen=True)
class MetricSpec:
    """A metric: how it is called, which direction is better, and how it is computed, by exactly one function.

    name       lower-case, with underscores: the key in scores.json
    unit       what the number counts: "× 100", "words", "nats"
    better     `higher`, `lower`, or empty where the metric has no preferred direction
    summary    one line
    per_row    from a model's answers to a value for each row (None: the row has none); the metric is their mean
    overall    from a model's answers to one value, where it is no mean over rows
    of_tokens  from the references under model and teacher to one value (None: it needs a teacher that is absent)
    title      what tables and charts call it; empty: the name, in words
    """

    name: str
    unit: str
    better: str
    summary: str
    per_row: Callable[[Answers], Sequence[float | None]] | None = None
    overall: Callable[[Answers], float | None] | None = None
    of_tokens: Callable[[TokenScores], float | None] | None = None
    title: str = ""

    def __post_init__(self) -> None:
        if not self.title:
            object.__setattr__(self, "title", self.name.replace("_", " "))
