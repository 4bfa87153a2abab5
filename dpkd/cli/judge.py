"""`dpkd judge`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dpkd.errors import SettingsError

if TYPE_CHECKING:
    from dpkd.evaluation.judge import JudgeReport

KEY = "DPKD_JUDGE_KEY"


def judge(
    predictions: Annotated[Path, typer.Argument(help="predictions-SEED.jsonl, or JSON lines with prompt and answer")],
    model: Annotated[str, typer.Option(help="name of the judge model at the endpoint")],
    references: Annotated[
        Path | None, typer.Argument(help="references; without it: those in PREDICTIONS", show_default=False)
    ] = None,
    endpoint: Annotated[
        str, typer.Option(help="base URL of an OpenAI-compatible API; its key is read from DPKD_JUDGE_KEY")
    ] = "https://api.openai.com/v1",
    limit: Annotated[int, typer.Option(help="number of rows to judge, from the first; 0: all", min=0)] = 100,
    parallel: Annotated[int, typer.Option(help="requests at a time", min=1)] = 4,
    timeout: Annotated[float, typer.Option(help="seconds to wait for an answer", min=0.1)] = 60.0,
    attempts: Annotated[int, typer.Option(help="maximum number of requests per row", min=1)] = 6,
    price_prompt: Annotated[
        float | None, typer.Option(help="price of a million prompt tokens", min=0.0, show_default=False)
    ] = None,
    price_completion: Annotated[
        float | None, typer.Option(help="price of a million tokens of answers", min=0.0, show_default=False)
    ] = None,
    extra: Annotated[str, typer.Option(help="additional request fields, as JSON; null removes one")] = "{}",
    output: Annotated[
        Path | None, typer.Option(help="file of the judgements [default: beside PREDICTIONS]", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of a sentence")] = False,
) -> None:
    """Have a language model score answers against references, from 1 to 10.

    Verdicts are kept: an interrupted call goes on, and nothing is paid for twice.
    """
    from rich.console import Console

    from dpkd.cli.progress import shown
    from dpkd.evaluation import predictions as files
    from dpkd.evaluation.chat import Endpoint
    from dpkd.evaluation.judge import Prices, verdict_files
    from dpkd.evaluation.judge import judge as run

    rows = files.read_predictions(predictions)
    wanted = (
        files.own_references(rows)
        if references is None
        else files.match_references(rows, files.read_references(references))
    )
    count = limit or len(rows)
    verdicts, summary = verdict_files(predictions, model) if output is None else (output, output.with_suffix(".json"))
    if summary == verdicts:
        raise SettingsError([f"--output {output}: expected a .jsonl file; the summary is written beside it, as .json"])
    asked = Endpoint(endpoint, model, os.environ.get(KEY, "").strip() or None, _extra(extra), timeout, attempts)
    console = Console(stderr=True)
    with shown(console) as progress:
        report = run(
            rows[:count],
            wanted[:count],
            asked,
            verdicts=verdicts,
            summary=summary,
            parallel=parallel,
            prices=Prices(price_prompt, price_completion),
            progress=lambda done, of: progress("judged", done, of),
            say=lambda text: console.print(text, markup=False, highlight=False, soft_wrap=True),
        )
    if as_json:
        typer.echo(json.dumps(report.as_dict(), indent=2))
    else:
        _print(report, len(rows), verdicts)


def _extra(text: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise SettingsError([f"--extra {text}: expected a JSON object, such as '{{\"max_tokens\": null}}'"])
    return values


def _print(report: JudgeReport, rows: int, verdicts: Path) -> None:
    facts = report.as_dict()
    mean, sd = facts["mean"], facts["sd_over_rows"]
    score = "no score" if mean is None else f"{mean:.2f}" + ("" if sd is None else f" (sd over rows {sd:.2f})")
    typer.echo(f"{report.judge}: {score}, on a scale from 1 to 10")
    of = f" of {rows} in the file" if rows != facts["rows"] else ""
    missing = facts["rows"] - facts["judged"]
    again = f"; {missing} got no score: rerun to retry" if missing else ""
    typer.echo(f"{facts['rows']} rows{of}: {facts['judged']} judged, {facts['asked_now']} asked now{again}")
    cost = "" if facts["new_cost"] is None else f", cost {facts['new_cost']:.4f} (all rows: {facts['cost']:.4f})"
    typer.echo(f"{facts['new_prompt_tokens']:,} + {facts['new_completion_tokens']:,} tokens used now{cost}")
    typer.echo(f"verdicts: {verdicts}")
