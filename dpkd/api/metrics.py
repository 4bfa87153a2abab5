"""Metrics of a model's answers, for `dpkd eval`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Answers:
    """A model's answers to the rows of a set, under one seed; all of one length, in the order of the rows.

    predictions  the answers as text, without surrounding white space
    references   the accepted answers of each row, at least one
    tokens       tokens of each answer, EOS included
    truncated    whether an answer ran into the length limit
    """

    predictions: Sequence[str]
    references: Sequence[Sequence[str]]
    tokens: Sequence[int]
    truncated: Sequence[bool]


@dataclass(frozen=True)
class MetricSpec:
    """A metric: how it is called, which direction is better, and how it is computed.

    name     lower-case, with underscores: the key in scores.json
    unit     what the number counts: "× 100", "words", "nats"
    better   `higher`, `lower`, or empty where the metric has no preferred direction
    summary  one line
    title    what tables and charts call it; empty: the name, in words
    per_row  a function from answers to a value for each row (None: the row has none); the metric is their mean
    overall  a function from answers to one value, where it is no mean over rows
    """

    name: str
    unit: str
    better: str
    summary: str
    per_row: Callable[[Answers], Sequence[float | None]] | None = None
    overall: Callable[[Answers], float | None] | None = None
    title: str = ""

    def __post_init__(self) -> None:
        if not self.title:
            object.__setattr__(self, "title", self.name.replace("_", " "))
