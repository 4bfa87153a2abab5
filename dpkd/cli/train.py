"""`dpkd train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

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
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Distil a teacher into a student."""
    flags = {
        **run_flags(loss=loss, teacher=teacher, student=student, data=data, output=output, seed=seed),
        "--probe": ("batch.probe", True if probe else None),
        "--trust-remote-code": ("student.trust_remote_code", True if trust_remote_code else None),
    }
    if resume is not None:
        given = [flag for flag, (_, value) in flags.items() if value is not None and flag != "--trust-remote-code"]
        given += ["--config"] if config else []
        if given:
            raise SettingsError([f"--resume uses the settings of the run; remove {', '.join(given)}"])
        from dpkd.train.resume import resume_folder

        resume_folder(resume, assignments=set_ or [], trust_remote_code=trust_remote_code)
        return
    if trust_remote_code and teacher is not None:
        flags["--trust-remote-code (teacher)"] = ("teacher.trust_remote_code", True)
    with waiting("starting"):
        settings = resolved(config=config, assignments=set_, flags=flags)
        from dpkd.train.plan import dry_run as show_plan
        from dpkd.train.run import train as run
    if dry_run:
        show_plan(settings)
    else:
        run(settings)
