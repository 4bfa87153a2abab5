"""`dpkd sweep`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def sweep(
    file: Annotated[Path, typer.Argument(help="YAML file: stages of runs, and how they are scored")],
    devices: Annotated[
        str | None,
        typer.Option(
            help="GPUs to use side by side, e.g. 0,1; 0,0: two runs on one [default: one run at a time]",
            show_default=False,
        ),
    ] = None,
    isolate: Annotated[bool, typer.Option("--isolate", help="each run in a process of its own")] = False,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="PATH=VALUE for all runs (teacher.model=gpt2-xl), or of the sweep (output=runs/mine); repeatable",
            show_default=False,
        ),
    ] = None,
    tiny: Annotated[
        bool, typer.Option("--tiny", help="two steps and a few rows for each run, to see that the sweep works")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="list the runs; run nothing")] = False,
) -> None:
    """Run a matrix of settings, resumable; failed runs are listed and do not stop the others."""
    from dpkd.train.sweep import read_sweep

    plan = read_sweep(file, assignments=set_ or [], tiny=tiny)
    if dry_run:
        for run in plan.runs:
            after = f" (after {', '.join(run.needs)})" if run.needs else ""
            typer.echo(f"{run.folder}{after}")
        return
    from dpkd.train.sweep_running import run_sweep, summary

    outcome = run_sweep(plan, devices=[d.strip() for d in devices.split(",")] if devices else (), isolate=isolate)
    finished = [str(run.folder) for run in plan.runs if run.name in (*outcome.done, *outcome.found)]
    if finished:
        typer.echo(f"report on them: dpkd report {plan.settings.output}")
        typer.echo(f"compare them: dpkd compare {' '.join(finished)}")
    typer.echo(summary(outcome))
