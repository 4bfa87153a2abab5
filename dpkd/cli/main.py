"""The command line: parse, call, print. Commands import what they need when they run, so that help costs no torch."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from dpkd.cli.cache import cache
from dpkd.cli.compare_runs import compare_runs
from dpkd.cli.config import config_app
from dpkd.cli.demo import demo
from dpkd.cli.evaluate import evaluate
from dpkd.cli.judge import judge
from dpkd.cli.losses import check_loss, describe_loss, list_losses
from dpkd.cli.new_loss import new_loss
from dpkd.cli.publish import export, push
from dpkd.cli.report import report
from dpkd.cli.sample import sample
from dpkd.cli.score import score
from dpkd.cli.sweep import sweep
from dpkd.cli.train import train
from dpkd.errors import DpkdError, Stopped, printable

app = typer.Typer(
    name="dpkd",
    help="Distil language models with any objective.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

app.command("train")(train)
app.command("sweep", short_help="Run a matrix of settings.")(sweep)
app.command("eval", short_help="Score a model on held-out rows.")(evaluate)
app.command("sample", short_help="Write a model's responses to a file.")(sample)
app.command("cache", short_help="Store what the teacher says of a run's text.")(cache)
app.command("compare", short_help="Compare runs: scores, significance, cost.")(compare_runs)
app.command("report", short_help="Write a page about runs: curves, scores, samples.")(report)
app.command("score", short_help="Score a file of predictions.")(score)
app.command("judge", short_help="Have a language model score answers.")(judge)
app.command("push", short_help="Upload a model and its card to the hub.")(push)
app.command("export", short_help="Write a model as GGUF.")(export)
app.command("list-losses")(list_losses)
app.command("describe-loss", short_help="Explain a loss and its settings.")(describe_loss)
app.command("check-loss", short_help="Run the conformance checks on a loss.")(check_loss)
app.command("new-loss", short_help="Write a package for a loss of your own.")(new_loss)
app.add_typer(config_app, name="config")
app.command("demo", short_help="Distil a real teacher, here and now.")(demo)


def _version(asked: bool) -> None:
    if asked:
        from dpkd import __version__

        typer.echo(f"dpkd {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    """Distil language models with any objective."""


def main() -> None:
    """Entry point: a user's mistake is a sentence and an exit code, never a traceback (DPKD_DEBUG=1 shows it)."""
    try:
        app()
    except DpkdError as error:
        if os.environ.get("DPKD_DEBUG"):
            raise
        if isinstance(error, Stopped):
            typer.echo(printable(str(error)), err=True)
        else:
            _complain(str(error))
        sys.exit(error.exit_code)
    except OSError as error:  # what no part of the command expected of the file system
        if os.environ.get("DPKD_DEBUG"):
            raise
        _complain(f"{error.filename or 'the file system'}: {error.strerror or error}. What was saved before is intact.")
        sys.exit(1)
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        sys.exit(130)
    except SystemExit as stop:  # typer turns Ctrl-C into this and says nothing
        if stop.code == 130:
            typer.echo("interrupted", err=True)
        raise


def _complain(text: str) -> None:
    for line in printable(text).splitlines():
        typer.secho(line, fg=typer.colors.RED, err=True)


if __name__ == "__main__":  # torchrun -m dpkd.cli.main
    main()
