"""The order of the data: which examples each optimizer step uses. A pure function of lengths, seed and step."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

Refresh = Literal["every_step", "every_n_steps", "per_epoch", "once"]

# Examples are sorted by length within buckets of this many windows: close in length, still well shuffled.
BUCKET_WINDOWS = 16


def epoch_windows(lengths: Sequence[int], size: int, *, seed: int, epoch: int) -> list[list[int]]:
    """Indices of the examples of each optimizer step of an epoch; every example once, neighbours alike in length.

    >>> sorted(i for window in epoch_windows([5, 1, 4, 2, 3], 2, seed=0, epoch=0) for i in window)
    [0, 1, 2, 3, 4]
    """
    rng = random.Random(f"order/{seed}/{epoch}")
    order = list(range(len(lengths)))
    rng.shuffle(order)
    windows = []
    bucket = size * BUCKET_WINDOWS
    for start in range(0, len(order), bucket):
        near = sorted(order[start : start + bucket], key=lambda i: (lengths[i], i))
        windows += [near[i : i + size] for i in range(0, len(near), size)]
    rng.shuffle(windows)
    return windows


class BatchSampler:
    """Maps an optimizer step to its examples, and to the refresh period of the student's text.

    A refresh period covers `every` windows (one, n, an epoch, or all of them), gone over `num_iterations` times.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        *,
        batch_size: int,
        steps: int,
        seed: int,
        refresh: Refresh = "every_step",
        every: int = 1,
        num_iterations: int = 1,
    ) -> None:
        self.steps = steps
        self._seed = seed
        self._inner_epochs = num_iterations
        self.windows_per_epoch = -(-len(lengths) // batch_size)
        self._epoch = lru_cache(maxsize=2)(lambda epoch: epoch_windows(lengths, batch_size, seed=seed, epoch=epoch))
        self._period_windows = {
            "every_step": 1,
            "every_n_steps": every,
            "per_epoch": self.windows_per_epoch,
            "once": max(1, -(-steps // num_iterations)),
        }[refresh]

    def _window(self, number: int) -> list[int]:
        epoch, within = divmod(number, self.windows_per_epoch)
        return self._epoch(epoch)[within]

    def _place(self, step: int) -> tuple[int, int, int]:
        """Refresh period, pass over it, and window within the pass."""
        period, within = divmod(step, self._period_windows * self._inner_epochs)
        return period, *divmod(within, self._period_windows)

    def window(self, step: int) -> list[int]:
        """Indices of the examples of a step (0-based)."""
        period, inner, within = self._place(step)
        if inner:  # later passes over the same responses come in another order
            order = list(range(self._period_windows))
            random.Random(f"inner/{self._seed}/{period}/{inner}").shuffle(order)
            within = order[within]
        return self._window(period * self._period_windows + within)

    def period(self, step: int) -> int:
        """Number of the refresh period of a step."""
        return self._place(step)[0]

    def starts_period(self, step: int) -> bool:
        """Whether the student writes anew before this step."""
        _, inner, within = self._place(step)
        return inner == 0 and within == 0
