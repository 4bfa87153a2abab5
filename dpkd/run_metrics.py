"""Reading what a run wrote step by step: `metrics.jsonl` and `dev.jsonl`, and whether its pairs collapsed."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from dpkd.errors import DpkdError
from dpkd.io import JsonLog, with_non_finite


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All lines of a file of metrics, in order, without a torn last line.

    Raises DpkdError, with file and line, when another line is damaged, or the file cannot be read.
    """
    if not path.exists():
        raise DpkdError(f"{path}: the metrics of a run cannot be read (no such file)")
    return [with_non_finite(row) for row in JsonLog(path, step=int).rows()]


# Nats per token below the best value so far: e times less likely, token for token. Runs that collapsed fell by 4 to 40
# (docs/results.md) and were noticed within 40 steps; those that held stayed within 1, or had y_s above y_t.
FALL = 1.0
TIMES = 3  # logged steps in a row


def logps_per_token(metrics: Mapping[str, float]) -> tuple[float, float] | None:
    """log q of chosen and of rejected responses on a logged step, in nats per token; None where there are no pairs."""
    names = ("logp/chosen", "length/chosen", "logp/rejected", "length/rejected")
    if any(name not in metrics for name in names):
        return None
    logp_t, length_t, logp_s, length_s = (metrics[name] for name in names)
    return logp_t / max(1.0, length_t), logp_s / max(1.0, length_s)


# The reverse KL to the teacher over its lowest, both means of TIMES logged steps; and by so many nats at least. On
# stale pairs without a likelihood term it rose to twice its lowest, and Rouge-L fell from 13.8 to 2.3, while log q of
# the chosen responses fell by half a nat; in the runs beside it, it stayed below 1.2 times (docs/results.md).
RISE, FEWEST_NATS = 1.5, 0.5
# Where it rises at once, no such mean is low. The first logged step is one batch, hence more nats above that: on stale
# pairs of short stories five of six runs of `dpo` and `dpkd-ipo` rose by 1.25 and more, no run on fresh ones by 0.95.
NATS_ABOVE_FIRST = 1.1


class Collapse(NamedTuple):
    """What has gone wrong with a preference, with numbers in nats per token before and now."""

    what: Literal["likelihood", "divergence"]
    best: float
    now: float


@dataclass
class CollapseDetector:
    """Whether training on pairs runs away, step by step.

    Both responses of a pair become less and less likely: log q(y_t) is far below its best, and log q(y_s) below that,
    for some time. Or the student leaves its teacher: the reverse KL is far above its lowest, or its first.
    """

    best: float | None = None
    lowest: float | None = None
    first: float | None = None
    _seen: int = 0
    _latest: deque[float] = field(default_factory=lambda: deque(maxlen=TIMES))

    def see(self, metrics: Mapping[str, float]) -> Collapse | None:
        """What has collapsed, with one more logged step; None where nothing has, or where there are no pairs."""
        if (logps := logps_per_token(metrics)) is None:
            return None
        return self._likelihood(*logps) or self._divergence(metrics.get("kl/reverse"))

    def _likelihood(self, chosen: float, rejected: float) -> Collapse | None:
        self.best = chosen if self.best is None else max(self.best, chosen)
        self._seen = self._seen + 1 if chosen < self.best - FALL and rejected < chosen else 0
        return Collapse("likelihood", self.best, chosen) if self._seen >= TIMES else None

    def _divergence(self, reverse_kl: float | None) -> Collapse | None:
        if reverse_kl is None:
            return None
        self._latest.append(reverse_kl)
        self.first = reverse_kl if self.first is None else self.first
        if len(self._latest) < TIMES:
            return None
        now = sum(self._latest) / TIMES
        self.lowest = now if self.lowest is None else min(self.lowest, now)
        for before, nats in ((self.lowest, FEWEST_NATS), (self.first, NATS_ABOVE_FIRST)):
            if now >= max(RISE * before, before + nats):
                return Collapse("divergence", before, now)
        return None


def collapse_step(rows: Iterable[Mapping[str, Any]]) -> int | None:
    """The logged step at which the pairs of a run had collapsed; None where they held, or where there are none."""
    detector = CollapseDetector()
    return next((int(row["step"]) for row in rows if detector.see(row) is not None), None)
