"""The metrics of a run: one JSON line per logged step, appended to `metrics.jsonl`.

A process can die at any byte, so the last line may be torn. It is never read, and is cut off before another
follows. Numbers that are not finite are written as the texts NaN, Infinity and -Infinity: strict readers of
JSON accept the file.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpkd.run_metrics import metric_lines, parsed_line


class MetricsLog:
    """Appends to a file of metrics; each line is on its way to the disk when `log` returns."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        _cut_torn_line(path)

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Append one line: the step, then the metrics (numbers, texts, or mappings and lists of them)."""
        line = json.dumps(_written({"step": step, **metrics}), ensure_ascii=False, allow_nan=False)
        # Opened anew for each line: `truncate_after` may have replaced the file; nothing is left to close.
        with self.path.open("a", encoding="utf-8", newline="\n") as file:
            file.write(line + "\n")
            file.flush()

    def truncate_after(self, step: int) -> int:
        """Drop the lines of later steps, which a resumed run writes again; returns how many went."""
        if not self.path.exists():
            return 0
        rows = metric_lines(self.path)
        kept = [line for line, row in rows if row["step"] <= step]
        if len(kept) < len(rows):
            unfinished = self.path.with_name(self.path.name + ".part")
            with unfinished.open("wb") as file:
                file.write(b"".join(line + b"\n" for line in kept))
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(self.path)
        return len(rows) - len(kept)


def _cut_torn_line(path: Path) -> None:
    """Make the file end at the end of a line: a whole last line gets its line feed, half a line goes."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        content = file.read()
        end = content.rfind(b"\n") + 1
        tail = content[end:]
        if tail.strip() and parsed_line(tail) is not None:
            file.write(b"\n")
        elif tail:
            file.truncate(end)


def _written(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {name: _written(item) for name, item in value.items()}
    return [_written(item) for item in value] if isinstance(value, list | tuple) else value
