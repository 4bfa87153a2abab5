"""Scores of predicted text against references: Rouge-L and exact match as the papers compute them, and what
predictions look like by themselves.

Both scores take the best of a row's references, are averaged over rows and multiplied by 100, as in MiniLLM's
evaluation, which the later distillation papers share. Rouge-L is that of the package rouge-score: its
tokeniser keeps `a-z` and `0-9` only, so that other alphabets vanish and a text in one of them scores 0. That
is a property of the published numbers, and kept.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cache, lru_cache
from typing import Any

from dpkd.errors import DpkdError
from dpkd.evaluation.lengths import (
    DEFAULT_CUTS,
    WORDS,
    LengthMeasure,
    bucket_labels,
    bucket_of,
    checked_cuts,
    word_count,
)


def lcs_length(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence: one bit per element of `a` in one integer.

    After Hyyrö, "Bit-parallel LCS-length computation revisited", 2004: faster than the table.

    >>> lcs_length("nematode", "empty")
    3
    """
    matches: dict[str, int] = {}
    for i, item in enumerate(a):
        matches[item] = matches.get(item, 0) | 1 << i
    full = (1 << len(a)) - 1
    row = full
    for item in b:
        hit = row & matches.get(item, 0)
        row = (row + hit | row - hit) & full
    return len(a) - row.bit_count()


class _RememberedStems:
    """The stemmer that rouge-score uses, asked once for a word: evaluations of one set share most of theirs."""

    def __init__(self) -> None:
        from nltk.stem.porter import PorterStemmer

        self.stem: Callable[[str], str] = lru_cache(maxsize=2**17)(PorterStemmer().stem)


_stemmer = cache(_RememberedStems)  # of this process: a stem depends on its word alone


class RougeL:
    """Rouge-L F-measure in [0, 1], equal to rouge-score's `rougeL` with stemming; the best of the references."""

    def words(self, text: str) -> list[str]:
        """The text as rouge-score sees it: lower-case, runs of `a-z0-9`, those longer than 3 stemmed."""
        from rouge_score.tokenize import tokenize

        return list(tokenize(text, _stemmer()))

    def __call__(self, prediction: str, references: Sequence[str]) -> float:
        predicted = self.words(prediction)
        return max(_f_measure(predicted, self.words(reference)) for reference in references)


def _f_measure(predicted: Sequence[str], reference: Sequence[str]) -> float:
    common = lcs_length(reference, predicted) if predicted and reference else 0
    if common == 0:
        return 0.0
    precision, recall = common / len(predicted), common / len(reference)
    return 2 * precision * recall / (precision + recall)


_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(text: str) -> str:
    """Lower-case, without ASCII punctuation, white space collapsed; articles stay (unlike SQuAD's).

    >>> normalise("  The U.S.A.,\\n it  is! ")
    'the usa it is'
    """
    return " ".join(text.lower().translate(_NO_PUNCTUATION).split())


def exact_match(prediction: str, references: Sequence[str]) -> bool:
    """Whether the prediction equals a reference after `normalise`."""
    predicted = normalise(prediction)
    return any(predicted == normalise(reference) for reference in references)


@dataclass(frozen=True)
class Score:
    """Means over rows, × 100; None where there is no row."""

    rows: int
    rouge_l: float | None
    exact_match: float | None


@dataclass(frozen=True)
class BucketScore:
    """The score of the rows whose first reference has a length in `label`."""

    label: str
    score: Score


@dataclass(frozen=True)
class TextStatistics:
    """What predictions look like, references aside. Shares are in [0, 1]; None where nothing can be counted.

    mean_words   white-space words per prediction
    distinct_1   different words / words, lower-cased, over all predictions together (Li et al. 2016)
    distinct_2   the same of pairs of neighbouring words
    repetition   share of an answer's 4-grams that it has said before (Welleck et al. 2020): mean over the
                 answers that have a 4-gram
    empty_share  predictions of nothing but white space
    """

    rows: int
    mean_words: float | None
    distinct_1: float | None
    distinct_2: float | None
    repetition: float | None
    empty_share: float | None


@dataclass(frozen=True)
class TextScores:
    """All scores of one set of predictions; `unit` is what `cuts` count."""

    overall: Score
    unit: str
    cuts: tuple[int, ...]
    buckets: tuple[BucketScore, ...]
    statistics: TextStatistics

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            **asdict(self.overall),
            "length_buckets": {
                "unit": self.unit,
                "cuts": list(self.cuts),
                "buckets": [{"label": bucket.label, **asdict(bucket.score)} for bucket in self.buckets],
            },
            "statistics": asdict(self.statistics),
        }


def score_texts(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    cuts: Sequence[int] = DEFAULT_CUTS,
    measure: LengthMeasure = WORDS,
) -> TextScores:
    """Rouge-L and exact match of every row, overall and by length of the *first* reference, and statistics.

    The first reference decides the bucket because it depends on the data alone: a row lies in the same bucket
    for every model, and more references do not move it. Without cuts there are no buckets.

    Raises DpkdError when the counts differ, there is no row, or a row has no reference; SettingsError for bad
    cuts.
    """
    cuts = checked_cuts(cuts)
    _check_rows(predictions, references)
    rouge = RougeL()
    rows = [
        (rouge(prediction, wanted), exact_match(prediction, wanted))
        for prediction, wanted in zip(predictions, references, strict=True)
    ]
    overall = _mean_score(rows)
    buckets: list[list[tuple[float, bool]]] = [[] for _ in bucket_labels(cuts)]
    for row, wanted in zip(rows, references, strict=True):
        buckets[bucket_of(measure.count(wanted[0]), cuts)].append(row)
    labelled = zip(bucket_labels(cuts), buckets, strict=True)
    scored = tuple(BucketScore(label, _mean_score(bucket)) for label, bucket in labelled)
    total = sum(bucket.score.rows for bucket in scored)
    if not overall.rows == total == len(predictions):
        raise DpkdError(f"{len(predictions)} rows were given, {overall.rows} were scored and {total} are in a bucket")
    return TextScores(overall, measure.unit, cuts, scored if cuts else (), text_statistics(predictions))


def _check_rows(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    if len(predictions) != len(references):
        raise DpkdError(
            f"{len(predictions)} predictions but references for {len(references)} rows: "
            "expected one row of references per prediction, in the same order"
        )
    if not predictions:
        raise DpkdError("there is nothing to score: 0 predictions")
    for i, wanted in enumerate(references):
        if isinstance(wanted, str) or not wanted:
            found = "a bare text" if isinstance(wanted, str) else "none"
            raise DpkdError(f"row {i + 1}: expected a list of at least one reference, found {found}")


def _mean_score(rows: Sequence[tuple[float, bool]]) -> Score:
    if not rows:
        return Score(0, None, None)
    rouge, exact = (100 * sum(values) / len(rows) for values in zip(*rows, strict=True))
    return Score(len(rows), rouge, exact)


def _ngrams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def distinct(answers: Iterable[Sequence[str]], n: int) -> float | None:
    """Different n-grams / n-grams over all answers (lists of words); None when there is no n-gram.

    >>> distinct([["a", "b"], ["a", "c"]], 1)
    0.75
    """
    ngrams = [ngram for words in answers for ngram in _ngrams(words, n)]
    return len(set(ngrams)) / len(ngrams) if ngrams else None


def repetition(words: Sequence[str], n: int = 4) -> float | None:
    """Share of n-grams of one answer that occurred in it before; None when it is too short to have one.

    >>> repetition("a b c d a b c d".split())
    0.2
    """
    ngrams = _ngrams(words, n)
    return (len(ngrams) - len(set(ngrams))) / len(ngrams) if ngrams else None


def text_statistics(predictions: Sequence[str]) -> TextStatistics:
    """Length, variety, repetition and emptiness of predictions."""
    answers = [prediction.lower().split() for prediction in predictions]
    repeated = [share for share in map(repetition, answers) if share is not None]
    return TextStatistics(
        rows=len(predictions),
        mean_words=_mean([word_count(prediction) for prediction in predictions]),
        distinct_1=distinct(answers, 1),
        distinct_2=distinct(answers, 2),
        repetition=_mean(repeated),
        empty_share=_mean([not prediction.strip() for prediction in predictions]),
    )


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
