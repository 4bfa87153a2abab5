"""The scores of an evaluation as tables on the terminal."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dpkd.errors import printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from dpkd.evaluation.results import Bucket, Evaluation, Metric

WIDE = 110  # columns from which there is room for what a metric is
OVERVIEW = ("rouge_l", "exact_match", "nll", "forward_kl", "reverse_kl")


def print_scores(name: str, result: Evaluation, folder: Path, console: Console) -> None:
    """All metrics of a model on a set, overall and by length of the reference, and what was scored."""
    from rich import box
    from rich.table import Table

    from dpkd.report.names import ordered

    seeds = "greedy" if result.facts["greedy"] else f"seeds {', '.join(map(str, result.seeds))}"
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("metric", overflow="fold")
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("", style="dim", overflow="fold")
    if console.width >= WIDE:
        table.add_column("", style="dim", overflow="fold")
    for key in ordered(result.metrics):
        metric = result.metrics[key]
        summary = [metric.summary] if console.width >= WIDE else []
        table.add_row(*map(printable, (metric.title or key, _cell(metric), _aside(result, key), *summary)))
    heading = printable(f"{name} on {result.facts['set']}: {seeds}")
    console.print(heading, highlight=False, markup=False, style="bold", soft_wrap=True)
    console.print(table)
    _print_by_length(result, console)
    console.print(counted(result), highlight=False, markup=False, soft_wrap=True)
    console.print(f"answers and scores: {folder}\n", highlight=False, markup=False, soft_wrap=True)


def _aside(result: Evaluation, key: str) -> str:
    """The unit of a metric; of a benchmark's, its standard error over questions."""
    stderr = result.facts.get("stderr", {}).get(key)
    return result.metrics[key].unit if stderr is None else f"± {stderr:.3f} standard error"


def _print_by_length(result: Evaluation, console: Console) -> None:
    """The metrics of rows again, by length of the first reference: as many buckets beside each other as fit."""
    left = [bucket for bucket in result.buckets if bucket.rows]
    while left:
        tables = (_by_length(result, left[:count]) for count in range(len(left), 0, -1))
        table = next((one for one in tables if _fits(one, console)), _by_length(result, left[:1]))
        console.print(table)
        left = left[len(table.columns) - 1 :]
    if empty := [bucket.label for bucket in result.buckets if not bucket.rows]:
        console.print(f"no rows in {', '.join(empty)}", highlight=False, markup=False, soft_wrap=True)


def _by_length(result: Evaluation, buckets: Sequence[Bucket]) -> Table:
    from rich import box
    from rich.table import Table

    from dpkd.report.names import ordered

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(f"by reference length ({result.length_unit})", overflow="fold")
    for bucket in buckets:
        table.add_column(bucket.label, justify="right", no_wrap=True)
    for key in ordered(result.metrics):
        if all(key in bucket.metrics for bucket in buckets):
            table.add_row(
                printable(result.metrics[key].title or key), *(_cell(bucket.metrics[key]) for bucket in buckets)
            )
    table.add_row("rows", *(str(bucket.rows) for bucket in buckets))
    return table


def _fits(table: Table, console: Console) -> bool:
    """Whether nothing of a table has to be folded or cut in the terminal."""
    from rich.measure import Measurement

    unbounded = console.options.update(width=sys.maxsize)
    return Measurement.get(console, unbounded, table).maximum <= console.width


def counted(result: Evaluation) -> str:
    """How many rows were read, left out and scored, in words."""
    read, skipped = result.facts["data"]["rows_read"], result.facts["data"]["skipped"]
    left_out = "".join(f", {count} skipped ({reason})" for reason, count in skipped.items())
    under = f" under each of {len(result.seeds)} seeds" if len(result.seeds) > 1 else ""
    return f"{read} rows read{left_out}, {result.rows} scored{under}"


def print_overview(results: list[tuple[str, Evaluation]], console: Console) -> None:
    """One line for each model and set; in a narrow terminal without the spread over seeds."""
    table = _overview(results, spread=True)
    console.print(table if _fits(table, console) else _overview(results, spread=False))


def _overview(results: list[tuple[str, Evaluation]], *, spread: bool) -> Table:
    from rich import box
    from rich.table import Table

    shown = [key for key in OVERVIEW if any(key in result.metrics for _, result in results)]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("model", overflow="fold")
    table.add_column("set", overflow="fold")
    titles = {key: metric.title or key for _, result in results for key, metric in result.metrics.items()}
    for heading in ("rows", *(titles[key] for key in shown)):
        table.add_column(printable(heading), justify="right")
    for name, result in results:
        cells = [_cell(result.metrics.get(key), spread=spread) for key in shown]
        table.add_row(printable(name), printable(result.facts["set"]), str(result.rows), *cells)
    return table


def _cell(metric: Metric | None, *, spread: bool = True) -> str:
    if metric is None:
        return "–"
    digits = 2 if abs(metric.mean) >= 10 else 3
    return f"{metric.mean:.{digits}f}" + (f" ± {metric.sd:.{digits}f}" if spread and metric.sd is not None else "")
