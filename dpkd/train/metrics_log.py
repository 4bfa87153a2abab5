"""The metrics of a run: one JSON line per logged step, appended to `metrics.jsonl`.

Numbers that are not finite are written as the texts NaN, Infinity and -Infinity, which strict readers of JSON accept.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpkd.api import Callback, Training
from dpkd.io import JsonLog


class MetricsLog(Callback):
    """Appends to a file of metrics; each line is on its way to the disk when `log` returns."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lines = JsonLog(path, step=int)

    def on_start(self, training: Training, step: int) -> None:
        """Drop what an interrupted run wrote after its last checkpoint."""
        self.truncate_after(step)

    def on_log(self, training: Training, step: int, line: Mapping[str, Any]) -> None:
        self.log(step, line)

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Append one line: the step, then the metrics (numbers, texts, or mappings and lists of them)."""
        self._lines.append({"step": step, **metrics})

    def truncate_after(self, step: int) -> int:
        """Drop the lines of later steps, which a resumed run writes again; returns how many went."""
        return self._lines.keep(lambda row: row["step"] <= step)
