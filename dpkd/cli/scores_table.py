"""The scores of an evaluation as tables on the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from dpkd.evaluation.results import Evaluation, Metric

ABOUT = {
    "rouge_l": "stemmed, best over references, × 100",
    "exact_match": "%, best over references",
    "nll": "of the references, nats per token",
    "perplexity": "of the references, per token",
    "bits_per_byte": "of the references",
    "teacher_nll": "nats per token",
    "forward_kl": "KL(teacher‖student), nats per token",
    "reverse_kl": "KL(student‖teacher), nats per token",
    "first_token_forward_kl": "the same at the first token",
    "first_token_reverse_kl": "the same at the first token",
    "reward_sum": "log q/p of the references",
    "reward_mean": "the same, per token",
    "student_answer_reward_sum": "log q/p of the model's own answers",
    "student_answer_reward_mean": "per token",
    "teacher_answer_reward_sum": "log q/p of the teacher's answers",
    "teacher_answer_reward_mean": "per token",
}
OVERVIEW = ("rouge_l", "exact_match", "nll", "forward_kl", "reverse_kl")


def print_scores(name: str, result: Evaluation, folder: Path, console: Console) -> None:
    """All metrics of a model on a set, overall and by length of the reference, and what was scored."""
    from rich import box
    from rich.table import Table

    seeds = "greedy" if result.facts["greedy"] else f"seeds {', '.join(map(str, result.seeds))}"
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("metric", no_wrap=True)
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("", style="dim", overflow="fold")
    for key, metric in result.metrics.items():
        table.add_row(key.replace("_", " "), _cell(metric), ABOUT.get(key, metric.unit))
    console.print(f"{name} on {result.facts['set']}: {seeds}", highlight=False, markup=False, style="bold")
    console.print(table)
    if result.buckets:
        console.print(_by_length(result))
    console.print(counted(result), highlight=False, markup=False, soft_wrap=True)
    console.print(f"answers and scores: {folder}\n", highlight=False, markup=False, soft_wrap=True)


def _by_length(result: Evaluation) -> Table:
    """The metrics of rows again, by length of the first reference."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(f"by reference length ({result.length_unit})")
    for bucket in result.buckets:
        table.add_column(bucket.label, justify="right", no_wrap=True)
    for key in result.metrics:
        if all(key in bucket.metrics for bucket in result.buckets if bucket.rows):
            cells = [_cell(bucket.metrics.get(key)) for bucket in result.buckets]
            table.add_row(key.replace("_", " "), *cells)
    table.add_row("rows", *(str(bucket.rows) for bucket in result.buckets))
    return table


def counted(result: Evaluation) -> str:
    """How many rows were read, left out and scored, in words."""
    read, skipped = result.facts["data"]["rows_read"], result.facts["data"]["skipped"]
    left_out = "".join(f", {count} left out ({reason})" for reason, count in skipped.items())
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
    for key in ("rows", *shown):
        table.add_column(key.replace("_", " "), justify="right", no_wrap=True)
    for name, result in results:
        cells = [_cell(result.metrics.get(key)) for key in shown]
        table.add_row(name, result.facts["set"], str(result.rows), *cells)
    console.print(table)


def _cell(metric: Metric | None) -> str:
    if metric is None:
        return "–"
    digits = 2 if abs(metric.mean) >= 10 else 3
    return f"{metric.mean:.{digits}f}" + ("" if metric.sd is None else f" ± {metric.sd:.{digits}f}")
