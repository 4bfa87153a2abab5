"""The command line: parse, call, print. Commands import what they need when they run, so that help costs no torch."""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

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
from dpkd.errors import DpkdError, ForeignExit, Stopped, described, printable


class _Commands(TyperGroup):
    """The commands. They end with typer.Exit or an exception: a SystemExit comes from a plugin or a library."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except SystemExit as stop:
            raise ForeignExit(stop.code) from stop


app = typer.Typer(
    name="dpkd",
    cls=_Commands,
    help="Distill language models with any objective.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

app.command("train")(train)
app.command("sweep", short_help="Run a matrix of settings.")(sweep)
app.command("eval", short_help="Score a model on held-out rows.")(evaluate)
app.command("sample", short_help="Write a model's responses to a file.")(sample)
app.command("cache", short_help="Store the teacher's log-probs of a run's text.")(cache)
app.command("compare", short_help="Compare runs: scores, significance, cost.")(compare_runs)
app.command("report", short_help="Write a page about runs: curves, scores, samples.")(report)
app.command("score", short_help="Score a file of predictions.")(score)
app.command("judge", short_help="Score answers with a language model.")(judge)
app.command("push", short_help="Upload a model and its card to the hub.")(push)
app.command("export", short_help="Write a model as GGUF.")(export)
app.command("list-losses")(list_losses)
app.command("describe-loss", short_help="Explain a loss and its settings.")(describe_loss)
app.command("check-loss", short_help="Run the conformance checks on a loss.")(check_loss)
app.command("new-loss", short_help="Write a package for your own loss.")(new_loss)
app.add_typer(config_app, name="config")
app.command("demo", short_help="Distill a small real model on this machine.")(demo)


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
    traceback: Annotated[
        bool, typer.Option("--traceback", help="show the traceback of an error; may stand anywhere in a call")
    ] = False,
) -> None:
    """Distill language models with any objective."""


def main() -> None:
    """Entry point: whatever goes wrong is a sentence and an exit code; `--traceback` shows where it came from.

    2 is a mistake in the call or in the settings, 1 what went wrong, 128 + N an end by signal N.
    """
    sys.argv[1:], traceback = _without("--traceback", sys.argv[1:])
    try:
        app()
    except SystemExit as stop:  # typer's own end; it turns Ctrl-C into 130 and says nothing
        if stop.code == 130:
            typer.echo(_interrupted(sys.argv[1:2]), err=True)
        raise
    except KeyboardInterrupt:
        typer.echo(_interrupted(sys.argv[1:2]), err=True)
        sys.exit(130)
    except BaseException as error:
        if traceback or os.environ.get("DPKD_DEBUG"):
            raise
        sys.exit(_explain(error))


# Commands that write as they go, and that the same call takes up where it ended.
RESUMED = {"cache", "eval", "judge", "sample", "sweep"}


def _interrupted(command: list[str]) -> str:
    """What Ctrl-C leaves.

    >>> _interrupted(["sample"]), _interrupted(["list-losses"])
    ('interrupted; the same command goes on from what was written', 'interrupted')
    """
    return "interrupted" + ("; the same command goes on from what was written" if RESUMED & {*command} else "")


def _without(flag: str, arguments: list[str]) -> tuple[list[str], bool]:
    """The arguments without a flag, and whether it stood among them; after `--` nothing is a flag."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    kept = [argument for argument in arguments[:end] if argument != flag]
    return kept + arguments[end:], len(kept) < end


def _explain(error: BaseException) -> int:
    """Say what went wrong; the exit code."""
    if isinstance(error, Stopped):
        typer.echo(printable(str(error)), err=True)
        return error.exit_code
    if isinstance(error, DpkdError):
        _complain(str(error))
        return error.exit_code
    if isinstance(error, OSError):  # what no part of the command expected of the file system
        _complain(f"{error.filename or 'the file system'}: {error.strerror or error}. What was saved before is intact.")
        return 1
    _complain(_unforeseen(error))
    return 1


def _unforeseen(error: BaseException) -> str:
    """A sentence about an error that no part of the command expected, and the file with its traceback."""
    import tempfile
    import traceback

    from dpkd import __version__

    head = f"unexpected error, {described(error)}"
    text = f"dpkd {__version__}, Python {sys.version}\n\n"
    try:
        text += "".join(traceback.format_exception(error))
    except Exception:  # the error's own code may fail once more
        text += f"{head}\n" + "".join(traceback.format_tb(error.__traceback__))
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="dpkd-error-", suffix=".txt", delete=False, encoding="utf-8", errors="backslashreplace"
        ) as file:
            file.write(text)
    except OSError:
        return f"{head}. Please report it with what the same call prints with --traceback."
    return f"{head}. Please report it with {file.name}, or call again with --traceback to see where it came from."


def _complain(text: str) -> None:
    for line in printable(text).splitlines():
        typer.secho(line, fg=typer.colors.RED, err=True)


if __name__ == "__main__":  # torchrun -m dpkd.cli.main
    main()
