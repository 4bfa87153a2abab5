"""Reading what a run wrote step by step: `metrics.jsonl` and `dev.jsonl`."""

from __future__ import annotations

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
