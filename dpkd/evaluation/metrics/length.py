"""How long answers are, and how often the model ends them itself."""

from __future__ import annotations

from dpkd.api import Answers, MetricSpec, hookimpl
from dpkd.evaluation.lengths import word_count


def _words(answers: Answers) -> list[float]:
    return [float(word_count(prediction)) for prediction in answers.predictions]


def _tokens(answers: Answers) -> list[float]:
    return [float(count) for count in answers.tokens]


def _ended(answers: Answers) -> list[float]:
    return [0.0 if truncated else 100.0 for truncated in answers.truncated]


SPECS = [
    MetricSpec("words", "words", "", "white-space words per answer", per_row=_words, title="words per answer"),
    MetricSpec("tokens", "tokens", "", "tokens per answer, EOS included", per_row=_tokens, title="tokens per answer"),
    MetricSpec(
        "eos_rate", "%", "higher", "answers with EOS before the length limit", per_row=_ended, title="finished answers"
    ),
]


@hookimpl
def dpkd_metrics() -> list[MetricSpec]:
    """This module's metrics."""
    return SPECS
