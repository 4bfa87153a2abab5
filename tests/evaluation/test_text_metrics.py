"""Rouge-L and exact match against an oracle written from their definitions, and against rouge-score."""

from __future__ import annotations

import json
import os
import string
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nltk.stem.porter import PorterStemmer
from rouge_score import rouge_scorer

from dpkd.errors import DpkdError, SettingsError
from dpkd.evaluation import text_metrics
from dpkd.evaluation.lengths import LengthMeasure
from dpkd.evaluation.text_metrics import (
    RougeL,
    distinct,
    exact_match,
    lcs_length,
    normalise,
    repetition,
    score_texts,
    text_statistics,
)

SHARED = Path(os.environ.get("DPKD_SHARED", Path(__file__).parents[3] / "shared"))
LETTERS_AND_DIGITS = frozenset("abcdefghijklmnopqrstuvwxyz0123456789")


def oracle_words(text: str, stemmer: PorterStemmer) -> list[str]:
    kept = "".join(c if c in LETTERS_AND_DIGITS else " " for c in text.lower())
    return [stemmer.stem(word) if len(word) > 3 else word for word in kept.split(" ") if word]


def oracle_lcs(a: list[str], b: list[str]) -> int:
    """Length of the longest common subsequence by the recurrence, a row of the table at a time."""
    row = np.zeros(len(b) + 1, dtype=np.int64)
    for word in a:
        equal = np.array([word == other for other in b], dtype=bool)
        candidate = np.maximum(row[1:], np.where(equal, row[:-1] + 1, 0))
        row = np.concatenate([[0], np.maximum.accumulate(candidate)])
    return int(row[-1])


def oracle_rouge_l(prediction: str, references: list[str], stemmer: PorterStemmer) -> float:
    scores = []
    for reference in references:
        p, r = oracle_words(prediction, stemmer), oracle_words(reference, stemmer)
        scores.append(2 * oracle_lcs(r, p) / (len(p) + len(r)) if p and r else 0.0)
    return max(scores)


def oracle_match(prediction: str, references: list[str]) -> bool:
    def plain(text: str) -> list[str]:
        return "".join(c for c in text.lower() if c not in string.punctuation).split()

    return any(plain(prediction) == plain(reference) for reference in references)


def dolly_pairs() -> tuple[list[str], list[list[str]]]:
    """1,000 pairs of real text: answers to other questions, cut, shuffled, equal, empty, not in ASCII."""
    path = SHARED / "data" / "dolly" / "dev.jsonl"
    if not path.is_file():
        pytest.skip(f"real data is absent: {path}")
    outputs = [json.loads(line)["output"] for line in path.read_text(encoding="utf-8").splitlines()]
    random = np.random.default_rng(0)
    predictions, references = [], []
    for i, output in enumerate(outputs):
        words = output.split()
        kinds = [
            outputs[(i + 17) % len(outputs)],
            " ".join(words[: len(words) // 2]),
            " ".join(random.permutation(words)),
            output.upper() + " ...",
            "" if i % 40 < 20 else " \n",
            "Ünïcödé 中文 " + output.replace("e", "é") if i % 2 else "Привет, " + output,
        ]
        predictions.append(kinds[i % len(kinds)])
        references.append([output] if i % 3 else [outputs[(i + 5) % len(outputs)], output, ""])
    assert len(predictions) == 1000
    return predictions, references


def test_scores_of_real_text_equal_the_oracle_and_rouge_score() -> None:
    predictions, references = dolly_pairs()
    stemmer = PorterStemmer()
    rouge = RougeL()
    ours = np.array([rouge(p, r) for p, r in zip(predictions, references, strict=True)])
    oracle = np.array([oracle_rouge_l(p, r, stemmer) for p, r in zip(predictions, references, strict=True)])
    published = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
    theirs = np.array(
        [published.score_multi(r, p)["rougeL"].fmeasure for p, r in zip(predictions, references, strict=True)]
    )
    np.testing.assert_allclose(ours, oracle, rtol=0, atol=1e-12)
    np.testing.assert_array_equal(ours, theirs)
    scores = score_texts(predictions, references)
    assert scores.overall.rouge_l == pytest.approx(100 * oracle.mean(), abs=1e-4)
    matches = [oracle_match(p, r) for p, r in zip(predictions, references, strict=True)]
    assert 0 < sum(matches) < 1000
    assert scores.overall.exact_match == pytest.approx(sum(matches) / 10, abs=1e-4)
    assert 5 < scores.overall.rouge_l < 95


def test_buckets_of_real_text_equal_means_over_masks() -> None:
    predictions, references = dolly_pairs()
    rouge = RougeL()
    values = np.array([rouge(p, r) for p, r in zip(predictions, references, strict=True)])
    lengths = np.array([len(r[0].split()) for r in references])
    buckets = score_texts(predictions, references).buckets
    assert [b.label for b in buckets] == ["(0,30]", "(30,70]", "(70,∞)"]
    for bucket, inside in zip(buckets, (lengths <= 30, (lengths > 30) & (lengths <= 70), lengths > 70), strict=True):
        assert bucket.score.rows == inside.sum() > 0
        assert bucket.score.rouge_l == pytest.approx(100 * values[inside].mean(), abs=1e-9)
    assert sum(b.score.rows for b in buckets) == 1000


def test_a_word_is_stemmed_once_however_often_a_set_is_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    real = PorterStemmer.stem
    monkeypatch.setattr(PorterStemmer, "stem", lambda self, word: asked.append(word) or real(self, word))
    text_metrics._stemmer.cache_clear()
    for _ in range(2):
        assert RougeL()("running dogs", ["dogs running", "dogs"]) > 0
    assert sorted(asked) == ["dogs", "running"]


def test_thousand_pairs_take_a_few_seconds() -> None:
    predictions, references = dolly_pairs()
    start = time.process_time()
    score_texts(predictions, references)
    assert time.process_time() - start < 5


words = st.lists(st.sampled_from(["a", "b", "c", "running", "runs"]), max_size=9)


@given(words, words)
def test_lcs_equals_the_recurrence(a: list[str], b: list[str]) -> None:
    assert lcs_length(a, b) == lcs_length(b, a) == oracle_lcs(a, b)


texts = st.text(alphabet=st.sampled_from("aB3 é中.ĳİK\n-\u2028runing"), max_size=30)
ROUGE, STEMMER = RougeL(), PorterStemmer()


@settings(max_examples=200)
@given(texts, st.lists(texts, min_size=1, max_size=3))
def test_small_strings_equal_the_oracle(prediction: str, references: list[str]) -> None:
    value = ROUGE(prediction, references)
    assert value == pytest.approx(oracle_rouge_l(prediction, references, STEMMER), abs=1e-12)
    assert 0 <= value <= 1
    assert exact_match(prediction, references) == oracle_match(prediction, references)


@given(texts, st.lists(texts, min_size=1, max_size=3), texts)
def test_another_reference_never_lowers_a_score(prediction: str, references: list[str], another: str) -> None:
    assert ROUGE(prediction, [*references, another]) >= ROUGE(prediction, references)
    assert exact_match(prediction, [*references, another]) >= exact_match(prediction, references)


@given(st.text(max_size=30))
def test_text_equals_itself(text: str) -> None:
    assert exact_match(text, [text])
    assert normalise(normalise(text)) == normalise(text)
    assert ROUGE(text, [text]) == (1.0 if ROUGE.words(text) else 0.0)


def test_letters_outside_of_ascii_vanish_from_rouge_but_not_from_exact_match() -> None:
    assert ROUGE("Ответ", ["Ответ"]) == 0.0
    assert ROUGE.words("naïve café") == ["na", "ve", "caf"]
    assert exact_match("Ответ!", ["ответ"])
    assert not exact_match("ответ", ["вопрос"])


def test_exact_match_keeps_articles_and_drops_punctuation() -> None:
    assert exact_match("The  answer,", ["the answer"])
    assert not exact_match("answer", ["the answer"])


def test_the_first_reference_decides_the_bucket() -> None:
    wanted = ["one two three four", "one"]
    scores = score_texts(["one", "one"], [wanted, wanted[::-1]], cuts=(2,))
    assert [(b.label, b.score.rows) for b in scores.buckets] == [("(0,2]", 1), ("(2,∞)", 1)]
    assert scores.overall.rouge_l == scores.overall.exact_match == 100


def test_a_bucket_without_rows_has_no_score_and_an_empty_reference_lies_in_the_first() -> None:
    scores = score_texts(["x"], [[""]])
    assert [b.score.rows for b in scores.buckets] == [1, 0, 0]
    assert scores.buckets[1].score.rouge_l is None
    assert scores.overall.rouge_l == 0


def test_the_unit_is_part_of_the_result() -> None:
    scores = score_texts(["a"], [["abcde"]], cuts=(3,), measure=LengthMeasure("characters", len)).as_dict()
    assert scores["length_buckets"]["unit"] == "characters"
    assert [b["rows"] for b in scores["length_buckets"]["buckets"]] == [0, 1]
    assert json.loads(json.dumps(scores)) == scores
    assert score_texts(["a"], [["b"]], cuts=()).as_dict()["length_buckets"]["buckets"] == []


def test_statistics_by_hand() -> None:
    found = text_statistics(["a b A b", "", " \n", "a b c d a b c d"])
    assert found.rows == 4
    assert found.mean_words == 3
    assert found.distinct_1 == 4 / 12  # a b c d of 12 words
    assert found.distinct_2 == 5 / 10  # ab ba bc cd da of 3 + 7 pairs
    assert found.repetition == (0 + 1 / 5) / 2  # one 4-gram, none repeated; five, one repeated
    assert found.empty_share == 0.5
    assert text_statistics(["", "x"]).repetition is None
    assert text_statistics([""]).distinct_1 is None
    assert repetition(["x"] * 10) == 6 / 7
    assert distinct([["a"], ["a"]], 2) is None


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        (["a", "b"], [["a"]], "2 predictions but references for 1 rows"),
        ([], [], "nothing to score"),
        (["a", "b"], [["a"], []], "row 2: expected a list of at least one reference, found none"),
        (["a"], ["abc"], "row 1: .* found a bare text"),
    ],
)
def test_rows_that_do_not_fit_are_named(predictions: list, references: list, message: str) -> None:
    with pytest.raises(DpkdError, match=message):
        score_texts(predictions, references)


@pytest.mark.parametrize("cuts", [(70, 30), (30, 30), (0, 5), (-1,)])
def test_cuts_must_rise(cuts: tuple[int, ...]) -> None:
    with pytest.raises(SettingsError, match="above the one before"):
        score_texts(["a"], [["a"]], cuts=cuts)
