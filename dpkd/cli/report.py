"""`dpkd report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dpkd.cli.options import TrustRemoteCode


def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="run folders, folders of evaluations, or one sweep's folder")
    ],
    output: Annotated[
        Path | None,
        typer.Option(help="HTML file [default: report.html in the folder named; of several: here]", show_default=False),
    ] = None,
    baseline: Annotated[
        Path | None,
        typer.Option(
            help="of a sweep: the run that the others are tested against [default: the first sft]", show_default=False
        ),
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

    Several runs are overlaid; those of a sweep are ranked. The page needs no network, and no model unless
    --token-rewards asks for it.
    """
    from dpkd.errors import SettingsError
    from dpkd.report.drawing import figures as figures_of
    from dpkd.report.drawing import write_figures
    from dpkd.report.experiment import is_sweep, read_experiment
    from dpkd.report.page import write_page, write_sweep_page
    from dpkd.report.reading import read_runs
    from dpkd.report.sweep_charts import sweep_figures

    read = read_runs(runs)
    if token_rewards:
        from dpkd.report.token_rewards import write_token_rewards

        for run in read:
            typer.echo(f"token rewards  {write_token_rewards(run, token_rewards, trust_remote_code=trust_remote_code)}")
        read = read_runs(runs)
    target = output or (runs[0] / "report.html" if len(runs) == 1 else Path("report.html"))
    if len(runs) == 1 and is_sweep(runs[0]):
        experiment = read_experiment(runs[0], baseline)
        write_sweep_page(experiment, target)
        drawn = sweep_figures(experiment) if figures else []
    else:
        if baseline is not None:
            raise SettingsError(["--baseline: only a sweep's folder is ranked; see `dpkd compare` for other runs"])
        write_page(read, target)
        drawn = figures_of(read) if figures else []
    typer.echo(f"report   {target}")
    if figures:
        folder = target.with_name(f"{target.stem}-figures")
        typer.echo(f"figures  {folder} ({len(write_figures(drawn, folder))} PNG files)")
