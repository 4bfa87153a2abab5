"""Reading what a run wrote line by line: `metrics.jsonl`, `dev.jsonl`, `samples.jsonl`.

A process can die at any byte, so the last line may be torn; it is never read.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from dpkd.errors import DpkdError

_NAMES = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All lines of a file of metrics, in order, without a torn last line.

    Raises DpkdError, with file and line, when another line is damaged, or the file cannot be read.
    """
    return [_read(row) for _, row in metric_lines(path)]


def metric_lines(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """The same as bytes without the line feed, and as the JSON that they are; numbers as they are written.

    Raises DpkdError as `read_metrics` does.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DpkdError(f"{path}: the metrics of a run cannot be read ({error.strerror})") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        row = parsed_line(line)
        if row is not None:
            rows.append((line, row))
        elif line.strip() and number < len(lines):
            raise DpkdError(
                f"{path}:{number}: expected one JSON object with a whole number `step` on this line. "
                "Only the last line of a run that was killed may be damaged; remove this one to go on."
            )
    return rows


def parsed_line(line: bytes) -> dict[str, Any] | None:
    """A line as JSON; None when it is no object with a whole number `step`."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def _read(value: Any) -> Any:
    if isinstance(value, str):
        return _NAMES.get(value, value)
    if isinstance(value, dict):
        return {name: _read(item) for name, item in value.items()}
    return [_read(item) for item in value] if isinstance(value, list) else value
