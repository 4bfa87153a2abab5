"""The paired bootstrap against an independent computation, an exact enumeration, and cases that are known."""

from __future__ import annotations

import itertools
import random

import pytest
from scipy import stats

from dpkd.report.bootstrap import paired_bootstrap


def test_the_same_scores_give_p_1() -> None:
    scores = [0.1 * i for i in range(40)]
    found = paired_bootstrap(scores, list(scores))
    assert (found.mean, found.low, found.high, found.p) == (0.0, 0.0, 0.0, 1.0)


def test_a_clear_difference_has_a_small_p_that_is_never_0() -> None:
    rng = random.Random(3)
    theirs = [rng.uniform(0, 50) for _ in range(60)]
    ours = [value + 5 + rng.uniform(-1, 1) for value in theirs]
    found = paired_bootstrap(ours, theirs)
    assert found.p == pytest.approx(2 / 10_001)
    assert found.low < 5 < found.high
    assert found.low > 0


def test_pairing_matters() -> None:
    """Rows differ far more than models do: only the pairs show the difference."""
    rng = random.Random(4)
    theirs = [rng.uniform(0, 100) for _ in range(50)]
    ours = [value + 1.0 for value in theirs]
    assert paired_bootstrap(ours, theirs).p < 0.001
    assert paired_bootstrap(rng.sample(ours, len(ours)), theirs).p > 0.05


def test_against_all_resamples_of_a_few_rows() -> None:
    """With 5 rows there are 5^5 draws: the exact shares, enumerated without the code under test."""
    gaps = [3.0, -1.0, 2.0, 0.5, -2.0]
    sums = [sum(draw) for draw in itertools.product(gaps, repeat=5)]
    assert len(sums) == 3125
    exact = 2 * min(sum(s <= 0 for s in sums), sum(s >= 0 for s in sums)) / len(sums)
    found = paired_bootstrap(gaps, [0.0] * 5, resamples=100_000)
    assert found.p == pytest.approx(exact, abs=0.01)
    assert 0.2 < exact < 0.9


def test_against_scipy() -> None:
    rng = random.Random(5)
    gaps = [rng.gauss(0.4, 2.0) for _ in range(80)]
    found = paired_bootstrap(gaps, [0.0] * 80, resamples=20_000)
    theirs = stats.bootstrap((gaps,), lambda x, axis: x.mean(axis), n_resamples=20_000, method="percentile", rng=1)
    assert found.low == pytest.approx(theirs.confidence_interval.low, abs=0.03)
    assert found.high == pytest.approx(theirs.confidence_interval.high, abs=0.03)
    below = (theirs.bootstrap_distribution <= 0).mean()
    assert found.p == pytest.approx(2 * min(below, 1 - below), abs=0.015)


def test_the_sign_turns_and_the_seed_repeats() -> None:
    rng = random.Random(6)
    a, b = ([rng.random() for _ in range(30)] for _ in range(2))
    one, other = paired_bootstrap(a, b), paired_bootstrap(b, a)
    assert (one.mean, one.low, one.p) == pytest.approx((-other.mean, -other.high, other.p))
    assert paired_bootstrap(a, b) == one
    assert paired_bootstrap(a, b, seed=11) != one


def test_rows_must_pair() -> None:
    with pytest.raises(ValueError, match="got 2 and 1"):
        paired_bootstrap([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="got 0"):
        paired_bootstrap([], [])
