"""`dpkd train`."""

from __future__ import annotations

import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dpkd.cli.options import (
    Config,
    Data,
    LossName,
    Output,
    Seed,
    Set,
    Student,
    Teacher,
    TrustRemoteCode,
    resolved,
    run_flags,
)
from dpkd.cli.progress import waiting
from dpkd.errors import SettingsError

if TYPE_CHECKING:
    from dpkd.train.timings import Timings


def train(
    loss: LossName = None,
    teacher: Teacher = None,
    student: Student = None,
    data: Data = None,
    output: Output = None,
    config: Config = None,
    set_: Set = None,
    seed: Seed = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the plan; load no weights")] = False,
    probe: Annotated[
        bool, typer.Option("--probe", help="run the longest batch first, to detect out-of-memory errors immediately")
    ] = False,
    resume: Annotated[
        Path | None,
        typer.Option(
            help="resume this run with its settings; --set can change those that do not affect data or models",
            show_default=False,
        ),
    ] = None,
    show_timings: Annotated[
        bool, typer.Option("--timings", help="print where the time of the start, a step and the end went")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Distil a teacher into a student."""
    flags = {
        **run_flags(loss=loss, teacher=teacher, student=student, data=data, output=output, seed=seed),
        "--probe": ("batch.probe", True if probe else None),
        "--trust-remote-code": ("student.trust_remote_code", True if trust_remote_code else None),
    }
    timings = _timings() if show_timings else None
    if resume is not None:
        given = [flag for flag, (_, value) in flags.items() if value is not None and flag != "--trust-remote-code"]
        given += ["--config"] if config else []
        if given:
            raise SettingsError([f"--resume uses the settings of the run; remove {', '.join(given)}"])
        from dpkd.train.resume import resume_folder

        resume_folder(resume, assignments=set_ or [], trust_remote_code=trust_remote_code, timings=timings)
        return
    if trust_remote_code and teacher is not None:
        flags["--trust-remote-code (teacher)"] = ("teacher.trust_remote_code", True)
    with waiting("starting"), timings("config") if timings is not None else nullcontext():
        settings = resolved(config=config, assignments=set_, flags=flags)
        from dpkd.train.plan import dry_run as show_plan
        from dpkd.train.run import train as run
    if dry_run:
        show_plan(settings)
    else:
        run(settings, timings=timings)


def _timings() -> Timings:
    """The time of this process, which has imported what a run needs."""
    # Until here Python has started and imported, all of it computing: no other clock begins with the process.
    began = time.perf_counter() - time.process_time()
    from dpkd.train.timings import Timings

    timings = Timings(on=True, began=began)
    with timings("imports"):
        import dpkd.train.resume  # noqa: F401
    return timings
