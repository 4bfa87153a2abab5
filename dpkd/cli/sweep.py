"""`dpkd sweep`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def sweep(
    file: Annotated[Path, typer.Argument(help="YAML file: stages of runs, and how they are scored")],
    devices: Annotated[
        str | None,
        typer.Option(help="GPUs to use side by side, e.g. 0,1 [default: one run at a time]", show_default=False),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="list the runs; run nothing")] = False,
) -> None:
    """Run a matrix of settings, resumable; failed runs are listed and do not stop the others."""
    from dpkd.train.sweep import read_sweep, run_sweep, summary

    plan = read_sweep(file)
    if dry_run:
        for run in plan.runs:
            after = f" (after {', '.join(run.needs)})" if run.needs else ""
            typer.echo(f"{run.folder}{after}")
        return
    outcome = run_sweep(plan, devices=[d.strip() for d in devices.split(",")] if devices else ())
    finished = [str(run.folder) for run in plan.runs if run.name in (*outcome.done, *outcome.found)]
    typer.echo(f"compare them: dpkd compare {' '.join(finished)}")
    typer.echo(summary(outcome))
