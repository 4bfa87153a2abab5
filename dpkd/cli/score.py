"""`dpkd score`: Rouge-L and exact match of a file of predictions, without any model."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dpkd.errors import SettingsError

if TYPE_CHECKING:
    from rich.table import Table

    from dpkd.evaluation.lengths import LengthMeasure
    from dpkd.evaluation.text_metrics import Score, TextScores


class Unit(StrEnum):
    """What the length of a reference is counted in."""

    WORDS = "words"
    TOKENS = "tokens"


def score(
    predictions: Annotated[
        Path, typer.Argument(help="JSON lines with `prediction` (or output, response, text, ...), or .txt")
    ],
    references: Annotated[
        Path | None,
        typer.Argument(help="JSON lines with `references` (or output, ...), or .txt; without it: those in PREDICTIONS"),
    ] = None,
    cuts: Annotated[str, typer.Option(help="upper bounds of the reference-length buckets; '': none")] = "30,70",
    unit: Annotated[Unit, typer.Option(help="what the cuts count")] = Unit.WORDS,
    tokenizer: Annotated[Path | None, typer.Option(help="folder, with --unit tokens")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of a table")] = False,
) -> None:
    """Score predictions against references: Rouge-L and exact match, also by length of the reference."""
    from dpkd.evaluation import predictions as files
    from dpkd.evaluation.lengths import parse_cuts
    from dpkd.evaluation.text_metrics import score_texts

    measure = _measure(unit, tokenizer)
    ends = parse_cuts(cuts)
    rows = files.read_predictions(predictions)
    if references is None:
        wanted = files.own_references(rows)
    else:
        wanted = files.match_references(rows, files.read_references(references))
    scores = score_texts([row.prediction for row in rows], wanted, cuts=ends, measure=measure)
    if as_json:
        typer.echo(json.dumps(scores.as_dict(), indent=2))
    else:
        _print(scores)


def _measure(unit: Unit, tokenizer: Path | None) -> LengthMeasure:
    from dpkd.evaluation.lengths import WORDS, tokens_of

    if (unit is Unit.TOKENS) != (tokenizer is not None):
        if tokenizer is None:
            raise SettingsError(["--unit tokens needs --tokenizer FOLDER, which defines the tokens"])
        raise SettingsError([f"--tokenizer {tokenizer} is used only with --unit tokens, found --unit {unit}"])
    return WORDS if tokenizer is None else tokens_of(tokenizer)


def _print(scores: TextScores) -> None:
    from rich.console import Console

    console = Console()
    console.print(_table(scores))
    s = scores.statistics
    console.print(
        f"predictions: {_number(s.mean_words)} words on average, distinct-1 {_percent(s.distinct_1)}, "
        f"distinct-2 {_percent(s.distinct_2)}, repeated 4-grams {_percent(s.repetition)}, "
        f"empty {_percent(s.empty_share)}",
        highlight=False,
    )


def _table(scores: TextScores) -> Table:
    from rich.table import Table

    table = Table()
    table.add_column(f"reference length ({scores.unit})" if scores.buckets else "")
    for name in ("rows", "Rouge-L", "exact match"):
        table.add_column(name, justify="right")
    for bucket in scores.buckets:
        table.add_row(bucket.label, *_cells(bucket.score))
    if scores.buckets:
        table.add_section()
    table.add_row("all", *_cells(scores.overall))
    return table


def _cells(score: Score) -> tuple[str, str, str]:
    return str(score.rows), _number(score.rouge_l), _number(score.exact_match)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}%"
