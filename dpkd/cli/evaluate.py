"""`dpkd eval`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from dpkd.evaluation.evaluate import Evaluation

__all__ = ["evaluate"]


def evaluate(
    model: Annotated[str, typer.Option(help="run folder, model folder or hub id")],
    data: Annotated[str, typer.Option(help="held-out rows: a file or hub id")],
    teacher: Annotated[
        str | None, typer.Option(help="for the divergences; a run brings its own", show_default=False)
    ] = None,
    greedy: Annotated[bool, typer.Option("--greedy", help="decode greedily instead of sampling at T = 1")] = False,
    max_new_tokens: Annotated[int, typer.Option(help="length limit of an answer", min=1)] = 256,
    batch_size: Annotated[int, typer.Option(help="answers written together", min=1)] = 32,
    limit: Annotated[int | None, typer.Option(help="only the first rows", min=1, show_default=False)] = None,
    seed: Annotated[int, typer.Option(help="seed of the sampling", min=0)] = 10,
    output: Annotated[
        Path | None,
        typer.Option(help="folder of predictions.jsonl and scores.json [default: RUN/eval/DATA]", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of a table")] = False,
) -> None:
    """Score a model on held-out rows: Rouge-L, exact match, likelihood, divergence to the teacher."""
    from rich.console import Console

    from dpkd.cli.progress import shown
    from dpkd.evaluation.evaluate import evaluate as run
    from dpkd.evaluation.subject import subject
    from dpkd.text.settings import SamplingSettings

    sampling = SamplingSettings(
        temperature=0.0 if greedy else 1.0, max_new_tokens=max_new_tokens, batch_size=batch_size
    )
    settings = subject(model, data, teacher=teacher, sampling=sampling, seed=seed, limit=limit, output=output)
    with shown(Console(stderr=True)) as progress:
        result = run(settings, progress=progress)
    if as_json:
        typer.echo(json.dumps(result.as_dict(), indent=2))
        return
    _print(result, settings.output)


def _print(result: Evaluation, output: Path | None) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_header=False)
    score, near = result.text.overall, result.divergences
    rows = [
        ("Rouge-L", score.rouge_l, "stemmed, best over references, × 100"),
        ("exact match", score.exact_match, "%"),
        ("NLL", near.nll, f"nats per response token, {near.tokens:,} tokens"),
        ("perplexity", near.perplexity, ""),
        ("teacher NLL", near.teacher_nll, "nats per response token"),
        ("forward KL", near.forward_kl, "KL(teacher‖student), nats per token"),
        ("reverse KL", near.reverse_kl, "KL(student‖teacher), nats per token"),
        ("mean words", result.text.statistics.mean_words, "per answer"),
        ("truncated", 100 * result.truncated / result.rows, "% of the answers"),
    ]
    for name, value, unit in rows:
        if value is not None:
            table.add_row(name, f"{value:.4f}", unit)
    console = Console()
    console.print(table)
    console.print(f"{result.rows} rows read, {score.rows} scored", highlight=False)
    if output is not None:
        console.print(f"predictions and scores: {output}", highlight=False)
