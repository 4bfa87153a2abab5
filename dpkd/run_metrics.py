"""Reading what a run wrote step by step: `metrics.jsonl` and `dev.jsonl`, and whether its pairs collapsed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


@dataclass
class CollapseDetector:
    """Whether both responses of a pair become less and less likely, step by step; numbers are nats per token."""

    best: float | None = None
    _seen: int = 0

    def collapsed(self, chosen: float, rejected: float) -> bool:
        """With one more logged step: log q(y_t) far below its best, and log q(y_s) below that, for some time."""
        self.best = chosen if self.best is None else max(self.best, chosen)
        self._seen = self._seen + 1 if chosen < self.best - FALL and rejected < chosen else 0
        return self._seen >= TIMES


def collapse_step(rows: Iterable[Mapping[str, Any]]) -> int | None:
    """The logged step at which the pairs of a run had collapsed; None where they held, or where there are none."""
    detector = CollapseDetector()
    pairs = ((int(row["step"]), logps) for row in rows if (logps := logps_per_token(row)) is not None)
    return next((step for step, logps in pairs if detector.collapsed(*logps)), None)
