"""Whether a score, or a difference between two models, is more than the luck of the rows: the bootstrap.

Koehn (2004), "Statistical Significance Tests for Machine Translation Evaluation", in its two-sided form: the rows are
drawn again with replacement, both models on the same rows, and the share of draws on either side of zero is counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

RESAMPLES = 10_000
SEED = 10
_AT_ONCE = 4_000_000  # numbers in memory


@dataclass(frozen=True)
class Difference:
    """Mean of `ours - theirs` over rows, its 95 % interval (percentiles), and the two-sided p-value.

    `corrected` is p after Holm's correction, where this difference was one of several.
    """

    mean: float
    low: float
    high: float
    p: float
    corrected: float | None = None


def holm(ps: Sequence[float]) -> list[float]:
    """p-values corrected for their number: with m of them, the i-th smallest times m - i + 1, and never falling.

    The chance that any of the true null hypotheses is rejected at α is at most α, however they depend on each other.
    Holm (1979), "A Simple Sequentially Rejective Multiple Test Procedure".

    >>> [round(p, 3) for p in holm([0.01, 0.04, 0.03])]
    [0.03, 0.06, 0.06]
    """
    corrected, most = [0.0] * len(ps), 0.0
    for rank, index in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        most = max(most, min(1.0, (len(ps) - rank) * ps[index]))
        corrected[index] = most
    return corrected


def bootstrap_means(values: Sequence[float], *, resamples: int = RESAMPLES, seed: int = SEED) -> Any:
    """Means `[resamples]` of the values, each of as many rows drawn with replacement, in float64."""
    import numpy as np

    values_N = np.asarray(values, dtype=np.float64)
    generator = np.random.default_rng(seed)
    means = np.empty(resamples)
    size = max(1, _AT_ONCE // len(values_N))
    for start in range(0, resamples, size):
        count = min(size, resamples - start)
        means[start : start + count] = values_N[generator.integers(0, len(values_N), (count, len(values_N)))].mean(
            axis=1
        )
    return means


def mean_interval(
    values: Sequence[float], *, resamples: int = RESAMPLES, seed: int = SEED
) -> tuple[float, float] | None:
    """The 95 % interval (percentiles) of the mean over rows; None for fewer than two rows."""
    import numpy as np

    if len(values) < 2:
        return None
    low, high = np.percentile(bootstrap_means(values, resamples=resamples, seed=seed), [2.5, 97.5])
    return float(low), float(high)


def paired_bootstrap(
    ours: Sequence[float], theirs: Sequence[float], *, resamples: int = RESAMPLES, seed: int = SEED
) -> Difference:
    """Compare scores of the same rows under two models.

    p = min(1, 2 · min(P(Δ* ≤ 0), P(Δ* ≥ 0))), each share as (count + 1) / (resamples + 1): never 0, and 1 where the
    scores are the same. Raises ValueError unless the rows are as many, and at least one.
    """
    import numpy as np

    if len(ours) != len(theirs) or not ours:
        raise ValueError(f"a paired test needs the same rows twice, got {len(ours)} and {len(theirs)}")
    gaps = np.asarray(ours, dtype=np.float64) - np.asarray(theirs, dtype=np.float64)
    means = bootstrap_means(gaps.tolist(), resamples=resamples, seed=seed)
    low, high = np.percentile(means, [2.5, 97.5])
    # The same sum in another order may miss zero by a rounding: such a mean is zero.
    means[np.abs(means) <= 1e-12 * max(1.0, float(np.abs(gaps).max()))] = 0.0
    side = min(int((means <= 0).sum()), int((means >= 0).sum()))
    return Difference(float(gaps.mean()), float(low), float(high), min(1.0, 2 * (side + 1) / (resamples + 1)))
