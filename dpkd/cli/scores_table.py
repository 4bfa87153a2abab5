"""The scores of an evaluation as tables on the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dpkd.errors import printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from dpkd.evaluation.results import Evaluation, Metric

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
    if result.buckets:
        console.print(_by_length(result))
    console.print(counted(result), highlight=False, markup=False, soft_wrap=True)
    console.print(f"answers and scores: {folder}\n", highlight=False, markup=False, soft_wrap=True)


def _aside(result: Evaluation, key: str) -> str:
    """The unit of a metric; of a benchmark's, its standard error over questions."""
    stderr = result.facts.get("stderr", {}).get(key)
    return result.metrics[key].unit if stderr is None else f"± {stderr:.3f} standard error"


def _by_length(result: Evaluation) -> Table:
    """The metrics of rows again, by length of the first reference."""
    from rich import box
    from rich.table import Table

    from dpkd.report.names import ordered

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(f"by reference length ({result.length_unit})", overflow="fold")
    for bucket in result.buckets:
        table.add_column(bucket.label, justify="right", no_wrap=True)
    for key in ordered(result.metrics):
        if all(key in bucket.metrics for bucket in result.buckets if bucket.rows):
            cells = [_cell(bucket.metrics.get(key)) for bucket in result.buckets]
            table.add_row(printable(result.metrics[key].title or key), *cells)
    table.add_row("rows", *(str(bucket.rows) for bucket in result.buckets))
    return table


def counted(result: Evaluation) -> str:
    """How many rows were read, left out and scored, in words."""
    read, skipped = result.facts["data"]["rows_read"], result.facts["data"]["skipped"]
    left_out = "".join(f", {count} skipped ({reason})" for reason, count in skipped.items())
    under = f" under each of {len(result.seeds)} seeds" if len(result.seeds) > 1 else ""
    return f"{read} rows read{left_out}, {result.rows} scored{under}"


def print_overview(results: list[tuple[str, Evaluation]], console: Console) -> None:
    """One line for each model and set."""
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
        cells = [_cell(result.metrics.get(key)) for key in shown]
        table.add_row(printable(name), printable(result.facts["set"]), str(result.rows), *cells)
    console.print(table)


def _cell(metric: Metric | None) -> str:
    if metric is None:
        return "–"
    digits = 2 if abs(metric.mean) >= 10 else 3
    return f"{metric.mean:.{digits}f}" + ("" if metric.sd is None else f" ± {metric.sd:.{digits}f}")
