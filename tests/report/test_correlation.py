"""Correlations against SciPy."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from dpkd.report.correlation import correlation, ranks


@pytest.mark.parametrize("seed", range(5))
def test_pearson_and_spearman_are_scipys(seed: int) -> None:
    generator = np.random.default_rng(seed)
    xs = np.round(generator.normal(size=17), 1)  # with ties
    ys = 0.4 * xs + generator.normal(size=17)
    found = correlation(xs.tolist(), ys.tolist())
    assert found is not None
    expected = stats.pearsonr(xs, ys)
    interval = expected.confidence_interval(0.95)
    assert found.pearson == pytest.approx(expected.statistic, abs=1e-12)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), abs=1e-9)
    assert found.spearman == pytest.approx(stats.spearmanr(xs, ys).statistic, abs=1e-12)
    assert found.count == 17
    assert ranks(xs.tolist()) == stats.rankdata(xs).tolist()


def test_there_is_none_where_nothing_varies_or_too_few_are_known() -> None:
    assert correlation([1.0, 2.0, 3.0], [1.0, 2.0, 4.0]) is None
    assert correlation([0.1] * 5, [1.0, 2.0, 3.0, 4.0, 5.0]) is None
    exact = correlation([1.0, 2.0, 3.0, 4.0], [-2.0, -4.0, -6.0, -8.0])
    assert exact is not None
    assert exact.pearson == pytest.approx(-1.0)
    assert exact.spearman == pytest.approx(-1.0)
