"""`dpkd report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dpkd.cli.options import TrustRemoteCode


def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="run folders, folders of evaluations, or a sweep's folder")
    ],
    output: Annotated[
        Path | None,
        typer.Option(help="HTML file [default: report.html in the folder named; of several: here]", show_default=False),
    ] = None,
    figures: Annotated[bool, typer.Option(help="also PNG files of the figures, beside the page")] = True,
    token_rewards: Annotated[
        int,
        typer.Option(
            min=0, help="load teacher and student of each run, and shade each token of this many answers by its reward"
        ),
    ] = 0,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """One HTML page about runs, to open from disk or to send to a colleague: curves, scores, samples, settings, cost.

    Several runs are overlaid. The page needs no network, and no model unless --token-rewards asks for it.
    """
    from dpkd.report.drawing import write_figures
    from dpkd.report.page import write_page
    from dpkd.report.reading import read_runs

    read = read_runs(runs)
    if token_rewards:
        from dpkd.report.token_rewards import write_token_rewards

        for run in read:
            typer.echo(f"token rewards  {write_token_rewards(run, token_rewards, trust_remote_code=trust_remote_code)}")
        read = read_runs(runs)
    target = output or (runs[0] / "report.html" if len(runs) == 1 else Path("report.html"))
    write_page(read, target)
    typer.echo(f"report   {target}")
    if figures:
        folder = target.with_name(f"{target.stem}-figures")
        typer.echo(f"figures  {folder} ({len(write_figures(read, folder))} PNG files)")
