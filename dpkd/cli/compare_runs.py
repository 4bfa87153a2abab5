"""`dpkd compare`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from dpkd.report.comparison import Comparison
    from dpkd.report.comparison_text import Grid
    from dpkd.report.reading import Run


class Format(StrEnum):
    """How a comparison is written."""

    TABLE = "table"
    MARKDOWN = "markdown"
    CSV = "csv"
    LATEX = "latex"
    JSON = "json"


def compare_runs(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="run folders, folders of evaluations, or a sweep's folder")
    ],
    baseline: Annotated[
        Path | None,
        typer.Option(
            help="the run that the others are tested against [default: the first with scores]", show_default=False
        ),
    ] = None,
    metrics: Annotated[
        str,
        typer.Option(
            help="comma-separated names, or `all` [default: rouge_l, exact_match, nll, forward_kl, reverse_kl]",
            show_default=False,
        ),
    ] = "rouge_l,exact_match,nll,forward_kl,reverse_kl",
    form: Annotated[Format, typer.Option("--format", help="how to write it")] = Format.TABLE,
    output: Annotated[
        Path | None, typer.Option(help="file to write [default: the terminal]", show_default=False)
    ] = None,
    resamples: Annotated[int, typer.Option(help="of the bootstrap", min=100)] = 10_000,
    seed: Annotated[int, typer.Option(help="of the bootstrap", min=0)] = 10,
    each: Annotated[bool, typer.Option("--each", help="a line for each run, also where only the seeds differ")] = False,
) -> None:
    """Scores of runs side by side: mean ± sd, significance against a baseline, and what training cost.

    Runs that differ in their seed alone are one line: the mean, and the sd between them.
    The test is a paired bootstrap over rows, from the scores in the runs' predictions; no model is loaded.
    """
    from dpkd.io import write_text
    from dpkd.report.comparison import compare
    from dpkd.report.seeds import by_seed, renamed_baseline

    read, base = _read(runs, baseline)
    if not each:
        read = by_seed(read)
        base = renamed_baseline(read, base)
    names = [name.strip().replace("-", "_") for name in metrics.split(",") if name.strip()]
    found = compare(read, base, metrics=names, resamples=resamples, seed=seed)
    text = _written(found, form)
    if output is None:
        typer.echo(text, nl=False)
        return
    write_text(output, text)
    typer.echo(f"{form.value}    {output}")


def _read(paths: list[Path], baseline: Path | None) -> tuple[list[Run], str]:
    """The runs, with the baseline first where it is not among them, and its name."""
    from dpkd.report.reading import read_runs, run_folders

    if baseline is None:
        read = read_runs(paths)
        return read, next((run for run in read if run.evaluations), read[0]).name
    paths = run_folders(paths)
    read = read_runs(paths if baseline.resolve() in [path.resolve() for path in paths] else [baseline, *paths])
    return read, next(run.name for run in read if run.path.resolve() == baseline.resolve())


def _written(found: Comparison, form: Format) -> str:
    from dpkd.report import comparison_text as text

    if form is Format.TABLE:
        return _table(found)
    writers = {
        Format.MARKDOWN: text.as_markdown,
        Format.CSV: text.as_csv,
        Format.LATEX: text.as_latex,
        Format.JSON: text.as_json,
    }
    return writers[form](found)


def _table(found: Comparison) -> str:
    """Tables as text that fits the terminal: metrics that do not fit side by side go into tables beneath."""
    import io
    import shutil

    from rich import box
    from rich.console import Console
    from rich.table import Table

    from dpkd.report.comparison_text import footnotes, grids
    from dpkd.report.escapes import line

    out, width = io.StringIO(), shutil.get_terminal_size().columns
    console = Console(file=out, width=width, highlight=False, markup=False, color_system=None)
    for grid in grids(found):
        console.print(line(grid.title))
        for columns in _fitting(grid, width):
            table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
            for index in columns:
                table.add_column(line(grid.heads[index]), justify="right" if index else "left", overflow="fold")
            for row in grid.rows:
                table.add_row(*(line(row[index]) for index in columns))
            console.print(table)
    for note in footnotes(found):
        console.print(line(note))
    return "\n".join(text.rstrip() for text in out.getvalue().splitlines()) + "\n"


def _fitting(grid: Grid, width: int) -> list[list[int]]:
    """The columns of a grid in groups that fit the width, each with the first column."""
    widths = [max(map(len, column)) + 3 for column in zip(grid.heads, *grid.rows, strict=True)]
    first = min(widths[0], width // 3)
    groups: list[list[int]] = [[0]]
    for index in range(1, len(widths)):
        if len(groups[-1]) > 1 and first + sum(widths[i] for i in groups[-1][1:]) + widths[index] > width:
            groups.append([0])
        groups[-1].append(index)
    return groups
