"""`dpkd compare`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from dpkd.report.comparison import Comparison
    from dpkd.report.reading import Run


class Format(StrEnum):
    """How a comparison is written."""

    TABLE = "table"
    MARKDOWN = "markdown"
    CSV = "csv"
    LATEX = "latex"
    JSON = "json"


def compare_runs(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="run folders, or folders of evaluations")],
    baseline: Annotated[
        Path | None,
        typer.Option(help="the run that the others are tested against [default: the first]", show_default=False),
    ] = None,
    metrics: Annotated[
        str, typer.Option(help="names with commas between, or `all`")
    ] = "rouge_l,exact_match,nll,forward_kl,reverse_kl",
    form: Annotated[Format, typer.Option("--format", help="how to write it")] = Format.TABLE,
    output: Annotated[
        Path | None, typer.Option(help="file to write [default: the terminal]", show_default=False)
    ] = None,
    resamples: Annotated[int, typer.Option(help="of the bootstrap", min=100)] = 10_000,
    seed: Annotated[int, typer.Option(help="of the bootstrap", min=0)] = 10,
) -> None:
    """Scores of runs side by side: mean ± sd, significance against a baseline, and what training cost.

    The test is a paired bootstrap over rows, from the scores in the runs' predictions; no model is loaded.
    """
    from dpkd.io import write_text
    from dpkd.report.comparison import compare

    read, base = _read(runs, baseline)
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
    from dpkd.report.reading import read_runs

    if baseline is None:
        read = read_runs(paths)
        return read, read[0].name
    real = [path.resolve() for path in paths]
    place = real.index(baseline.resolve()) if baseline.resolve() in real else None
    read = read_runs(paths if place is not None else [baseline, *paths])
    return read, read[place or 0].name


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
    """Tables as text of the terminal's width, or wide enough for a file."""
    import io

    from rich import box
    from rich.console import Console
    from rich.table import Table

    from dpkd.report.comparison_text import footnotes, grids

    out = io.StringIO()
    # As wide as the tables need: a line that is cut off says less than one that wraps.
    console = Console(file=out, width=1000, highlight=False, markup=False)
    for grid in grids(found):
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for index, head in enumerate(grid.heads):
            table.add_column(head, justify="right" if index else "left", no_wrap=True)
        for row in grid.rows:
            table.add_row(*row)
        console.print(grid.title)
        console.print(table)
    for note in footnotes(found):
        console.print(note, soft_wrap=True)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"
