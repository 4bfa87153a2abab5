"""`dpkd cache`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dpkd.cli.options import Config, Data, LossName, Seed, Set, Student, Teacher, resolved, run_flags
from dpkd.errors import SettingsError


def cache(
    output: Annotated[Path, typer.Option(help="folder of the store; rerun to resume an interrupted call")],
    loss: LossName = None,
    teacher: Teacher = None,
    student: Student = None,
    data: Data = None,
    config: Config = None,
    set_: Set = None,
    seed: Seed = None,
    kind: Annotated[
        str | None, typer.Option(help="tokens, topk or sampled [default: what the loss needs]", show_default=False)
    ] = None,
    k: Annotated[int | None, typer.Option(help="tokens stored at each position", min=1, show_default=False)] = None,
    dtype: Annotated[str, typer.Option(help="type of the log-probs: float16 or float32")] = "float16",
    batch_size: Annotated[int, typer.Option(help="responses read together", min=1)] = 16,
) -> None:
    """Write down what the teacher says of a run's text, so that the run needs no teacher: flags as for `dpkd train`."""
    problems = []
    if kind not in (None, "tokens", "topk", "sampled"):
        problems.append(f"--kind {kind}: should be tokens, topk or sampled")
    if dtype not in ("float16", "float32"):
        problems.append(f"--dtype {dtype}: should be float16 or float32")
    if problems:
        raise SettingsError(problems)
    flags = run_flags(loss=loss, teacher=teacher, student=student, data=data, seed=seed)
    settings = resolved(config=config, assignments=set_, flags=flags)
    from dpkd.train.cache import cache as run

    run(settings, output, kind=kind, k=k, dtype=dtype, batch_size=batch_size)  # type: ignore[arg-type]
