"""What the benchmarks share: turns within one process, a process per variant for memory, and tables.

Times are medians over repeats in which the variants take turns, so that a slow moment of the machine meets all of
them. Memory is that of a process of its own, because an allocator keeps what an earlier variant freed.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import MappingProxyType
from typing import Any

__all__ = ["call_in_process", "machine", "markdown", "peak_mib", "resident_mib", "seconds_of", "tokenizer_folder"]

HERE = Path(__file__).parent
SHARED = Path(os.environ.get("DPKD_SHARED", HERE.parents[1] / "shared"))


def tokenizer_folder() -> Path:
    """GPT-2's tokenizer of the shared folder. Raises SystemExit when it is not there."""
    folder = SHARED / "tokenizers" / "gpt2"
    if not folder.is_dir():
        raise SystemExit(f"no tokenizer in {folder}: set DPKD_SHARED")
    return folder


def seconds_of(steps: Mapping[str, Callable[[], Any]], repeats: int, warm_ups: int = 1) -> dict[str, float]:
    """Median seconds of each step; they take turns."""
    for _ in range(warm_ups):
        for step in steps.values():
            step()
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            taken[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in taken.items()}


def _status_mib(key: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) / 2**10


def peak_mib() -> float:
    """Peak of this process since it was started (ru_maxrss also counts the process that started it)."""
    return _status_mib("VmHWM")


def resident_mib() -> float:
    """What this process has now."""
    return _status_mib("VmRSS")


def call_in_process(
    module: str, function: str, *arguments: Any, environment: Mapping[str, str] = MappingProxyType({})
) -> Any:
    """The result of a function of a benchmark, in a new process; arguments and result are JSON.

    Raises SystemExit with what the process said when it fails.
    """
    code = (
        f"import json, sys; sys.path.insert(0, {str(HERE)!r}); import {module}\n"
        f"found = {module}.{function}(*json.loads(sys.argv[1]))\n"
        "print('\\n=> ' + json.dumps(found))"
    )
    command = [sys.executable, "-c", code, json.dumps(arguments)]
    around = os.environ | {"TOKENIZERS_PARALLELISM": "false"} | dict(environment)
    done = subprocess.run(command, capture_output=True, text=True, env=around)
    if done.returncode:
        raise SystemExit(f"{module}.{function}{arguments} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.rpartition("=> ")[2])


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def machine() -> str:
    """One line: processor, cores, threads, versions."""
    model = ""
    if (info := Path("/proc/cpuinfo")).is_file():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model n")]
        model = names[0] if names and names[0] != "unknown" else ""
    import torch

    parts = [model or platform.machine(), f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"]
    parts += [f"Python {platform.python_version()}"]
    for name in ("torch", "transformers", "accelerate", "trl", "liger-kernel"):
        try:
            parts.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            parts.append(f"no {name}")
    return ", ".join(parts)
