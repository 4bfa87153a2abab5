"""The memory that `dpkd train --dry-run` predicts against the peak of the run, each run in a process of its own.

The peak is that of the process over what it had with everything imported, and no model loaded. Each run is made as it
is by default, where the C library holds freed memory that it may use again, and so that freed memory goes back at once
(MALLOC_TRIM_THRESHOLD_); the plan tells the two apart.

    python benchmarks/memory.py [--tiny]
"""

from __future__ import annotations

import argparse
import gc
import tempfile
from pathlib import Path
from typing import Any

from harness import call_in_process, markdown, peak_mib, resident_mib
from shapes import GPT2_PAIR, TINY_PAIR, Shape, save_model, write_rows

ROWS, STEPS = 24, 3
RETURN_AT_ONCE = {"MALLOC_TRIM_THRESHOLD_": "1048576", "MALLOC_MMAP_THRESHOLD_": "1048576"}

# Name → student, teacher, and settings.
SMALL, LARGE = GPT2_PAIR
RUNS: dict[str, tuple[Shape, Shape, dict[str, Any]]] = {
    "fkl, 4 x 256 of 8 x 512": (SMALL, LARGE, {"loss.name": "fkl"}),
    "jsd, the same, two micro-batches": (SMALL, LARGE, {"loss.name": "jsd", "train.micro_batch_size": 4}),
    "sft, 8 x 512": (LARGE, SMALL, {"loss.name": "sft"}),
    "rkl, on the student's text": (SMALL, LARGE, {"loss.name": "rkl", "text.source": "student"}),
    "dpkd pairs, 4 x 256 of 8 x 512": (SMALL, LARGE, {"loss.name": "dpkd", "train.micro_batch_size": 16}),
    "fkl, 12 x 256, vocabulary 50k, batch of 16": (
        Shape(12, 256, 4),
        SMALL,
        {"loss.name": "fkl", "train.batch_size": 16, "train.micro_batch_size": 16},
    ),
    "fkl, gradient checkpointing": (
        Shape(12, 256, 4),
        SMALL,
        {
            "loss.name": "fkl",
            "train.batch_size": 16,
            "train.micro_batch_size": 16,
            "student.gradient_checkpointing": True,
        },
    ),
}
TINY = {"fkl": (*TINY_PAIR, {"loss.name": "fkl"})}


def prepare(folder: str, name: str, tiny: bool) -> None:
    """Models and rows of a run, made in another process than the one that is measured."""
    student, teacher, _ = (TINY if tiny else RUNS)[name]
    save_model(student, Path(folder) / "student", 0)
    save_model(teacher, Path(folder) / "teacher", 1)
    lengths = ((4, 8), (4, 8)) if tiny else ((64, 128), (15, 127))
    write_rows(Path(folder) / "rows.jsonl", ROWS, *lengths)


def settings_of(folder: Path, name: str, tiny: bool) -> dict[str, Any]:
    own = (TINY if tiny else RUNS)[name][2]
    common = {
        "student.model": str(folder / "student"),
        "data.path": str(folder / "rows.jsonl"),
        "data.template": "none",
        "train.device": "cpu",
        "train.steps": STEPS,
        "train.log_every": 1,
        "text.sampling.max_new_tokens": 64,
        "text.teacher_sampling.max_new_tokens": 64,
        "text.store": str(folder / "store"),
    }
    return common | ({} if own["loss.name"] == "sft" else {"teacher.model": str(folder / "teacher")}) | own


def predicted(folder: str, name: str, tiny: bool) -> tuple[float, str]:
    """MiB that the plan of the run says, and at which moment."""
    from rich.console import Console

    from dpkd.config.layers import flag_layer
    from dpkd.config.resolve import resolve
    from dpkd.plugins import load_registry
    from dpkd.train.memory import memory_estimate
    from dpkd.train.prepare import prepare as look
    from dpkd.train.progress import Display

    layers = [flag_layer("settings", path, value) for path, value in settings_of(Path(folder), name, tiny).items()]
    resolved = resolve(layers, load_registry())
    estimate = memory_estimate(resolved, look(resolved, Display(Console(quiet=True))))
    return estimate.total / 2**20, estimate.moment


def measured(folder: str, name: str, tiny: bool) -> float:
    """MiB by which the process grew over the run."""
    import datasets  # noqa: F401
    from transformers import GPT2LMHeadModel, GPT2TokenizerFast  # noqa: F401

    import dpkd.train.finish
    import dpkd.train.run

    gc.collect()
    before = resident_mib()
    settings = settings_of(Path(folder), name, tiny)
    # The folder of the run is new, for the runs with and without kept memory.
    dpkd.train(loss=settings.pop("loss.name"), output=tempfile.mkdtemp(dir=folder) + "/run", settings=settings)
    return peak_mib() - before


def row(name: str, tiny: bool) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        call_in_process("memory", "prepare", folder, name, tiny)
        cells = []
        for environment in ({}, RETURN_AT_ONCE):
            guess, moment = call_in_process("memory", "predicted", folder, name, tiny, environment=environment)
            peak = call_in_process("memory", "measured", folder, name, tiny, environment=environment)
            cells += [f"{guess:,.0f}", f"{peak:,.0f}", f"{guess / peak:.2f}"]
    return [name, moment, *cells]


def table(tiny: bool = False, names: list[str] | None = None) -> str:
    of_each = ["predicted, MiB", "measured, MiB", "predicted / measured"]
    head = ["run", "moment of the peak", *of_each, *(f"{column}, nothing held" for column in of_each)]
    rows = []
    for name in names or (TINY if tiny else RUNS):
        rows.append(row(name, tiny))
        print(*rows[-1], sep="  ", flush=True)
    return markdown(head, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--tiny", action="store_true", help="seconds instead of minutes: that it runs, not what it says"
    )
    parser.add_argument("--only", action="append", choices=list(RUNS))
    arguments = parser.parse_args()
    print(table(arguments.tiny, arguments.only))


if __name__ == "__main__":
    main()
