"""What metrics are called in reports and tables, and which direction is better."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

_TITLES = {
    "rouge_l": "Rouge-L",
    "exact_match": "exact match",
    "nll": "NLL",
    "perplexity": "perplexity",
    "bits_per_byte": "bits per byte",
    "forward_kl": "forward KL",
    "reverse_kl": "reverse KL",
    "first_token_forward_kl": "first-token forward KL",
    "first_token_reverse_kl": "first-token reverse KL",
    "teacher_nll": "NLL of the teacher",
    "reward_sum": "implicit reward of references, sum",
    "reward_mean": "implicit reward of references, per token",
    "student_answer_reward_sum": "implicit reward of own answers, sum",
    "student_answer_reward_mean": "implicit reward of own answers, per token",
    "teacher_answer_reward_sum": "implicit reward of the teacher's answers, sum",
    "teacher_answer_reward_mean": "implicit reward of the teacher's answers, per token",
    "eos_rate": "answers that end",
    "tokens": "tokens of an answer",
    "words": "words of an answer",
    "repetition": "repeated 4-grams",
    "distinct_1": "distinct-1",
    "distinct_2": "distinct-2",
}
_LOWER = (
    "nll",
    "perplexity",
    "bits_per_byte",
    "forward_kl",
    "reverse_kl",
    "first_token_forward_kl",
    "first_token_reverse_kl",
)
_HIGHER = ("rouge_l", "exact_match")


def title(metric: str) -> str:
    """A metric's name for people.

    >>> title("rouge_l"), title("my_metric")
    ('Rouge-L', 'my metric')
    """
    return _TITLES.get(metric, metric.replace("_", " "))


def better_by_name(metric: str) -> str:
    """`higher`, `lower`, or empty where neither is better in itself: for scores that do not say it."""
    return "higher" if metric in _HIGHER else "lower" if metric in _LOWER else ""


def ordered(metrics: Iterable[str]) -> list[str]:
    """What the papers report first, then the rest as found; each once.

    >>> ordered(["nll", "mine", "rouge_l", "nll"])
    ['rouge_l', 'nll', 'mine']
    """
    found = list(dict.fromkeys(metrics))
    return [name for name in _TITLES if name in found] + [name for name in found if name not in _TITLES]


def number(value: float | None) -> str:
    """Enough digits to tell runs apart, no more.

    >>> number(24.618), number(-1.0426), number(12345.6), number(1e-07), number(None)
    ('24.62', '−1.043', '12,346', '1.0e−07', '–')
    """
    if value is None or value != value:
        return "–"
    size = abs(value)
    if 0 < size < 0.001:
        text = f"{value:.1e}"
    else:
        text = f"{value:,.0f}" if size >= 1000 else f"{value:.2f}" if size >= 10 else f"{value:.3f}"
    return text.replace("-", "−")


def spread(mean: float | None, sd: float | None) -> str:
    """Mean ± standard deviation, with the digits of the mean.

    >>> spread(24.618, 0.3123), spread(2.0, None)
    ('24.62 ± 0.31', '2.000')
    """
    if mean is None or sd is None:
        return number(mean)
    digits = 0 if abs(mean) >= 1000 else 2 if abs(mean) >= 10 else 3
    return f"{number(mean)} ± {sd:,.{digits}f}"


def public(value: object) -> str:
    """A value as text; an absolute path by its last part: a page travels further than the machine that it is from.

    >>> public("/home/me/models/gpt2"), public("gpt2"), public(None)
    ('gpt2', 'gpt2', 'none')
    """
    if value is None:
        return "none"
    text = str(value)
    path = Path(text)
    return path.name if path.is_absolute() and path.name else text
