"""`dpkd eval`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dpkd.cli.options import SetData
from dpkd.errors import SettingsError

if TYPE_CHECKING:
    from rich.table import Table

    from dpkd.evaluation.evaluate import EvaluationSettings
    from dpkd.evaluation.results import Evaluation, Metric
    from dpkd.evaluation.subject import Subject

__all__ = ["evaluate"]


def evaluate(
    model: Annotated[list[str], typer.Option(help="run folder, model folder or hub id; repeatable")],
    data: Annotated[
        list[str],
        typer.Option(help="a file, hub id, or dolly, self-inst, vicuna, sinst, uinst; repeatable"),
    ],
    teacher: Annotated[
        str | None, typer.Option(help="for the divergences; a run brings its own", show_default=False)
    ] = None,
    seeds: Annotated[str, typer.Option(help="seeds of the sampling at T = 1")] = "10,20,30,40,50",
    greedy: Annotated[bool, typer.Option("--greedy", help="decode greedily, once, instead of sampling")] = False,
    max_new_tokens: Annotated[int, typer.Option(help="length limit of an answer", min=1)] = 256,
    batch_size: Annotated[int, typer.Option(help="answers written together", min=1)] = 32,
    limit: Annotated[int | None, typer.Option(help="only the first rows", min=1, show_default=False)] = None,
    max_prompt_tokens: Annotated[
        int | None, typer.Option(help="leave longer prompts out, and count them", min=1, show_default=False)
    ] = None,
    cuts: Annotated[str, typer.Option(help="ends of the buckets of reference length, in words; '': none")] = "30,70",
    rewards: Annotated[
        bool, typer.Option("--rewards", help="also the implicit reward of the model's and the teacher's answers")
    ] = False,
    sets_folder: Annotated[
        str | None,
        typer.Option(help="of the papers' sets [default: $DPKD_SETS, else the hub]", show_default=False),
    ] = None,
    set_: SetData = None,
    output: Annotated[
        Path | None, typer.Option(help="folder of the results [default: RUN/eval/SET]", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of tables")] = False,
) -> None:
    """Score models on held-out rows: Rouge-L, exact match, likelihood, divergence to the teacher; mean and spread.

    An interrupted evaluation goes on where it stopped: call it again.
    """
    from rich.console import Console

    from dpkd.cli.progress import shown
    from dpkd.evaluation.evaluate import Bench
    from dpkd.evaluation.sets import find_set
    from dpkd.evaluation.subject import find_subject

    settings = _settings(seeds, greedy, max_new_tokens, batch_size, rewards, cuts)
    sets = [find_set(name, sets_folder) for name in data]
    if max_prompt_tokens is not None:
        sets = [type(one)(**{**vars(one), "max_prompt_tokens": max_prompt_tokens}) for one in sets]
    subjects = [find_subject(name, teacher) for name in model]
    plans = [[_data(subject, one, limit, set_) for one in sets] for subject in subjects]
    if output is not None and len(subjects) > 1:
        raise SettingsError(["--output names one model's folder; with several models each has its own"])
    console, notes = Console(), Console(stderr=True)
    results: list[dict[str, Any]] = []
    for subject, own in zip(subjects, plans, strict=True):
        bench = Bench(subject.model, subject.teacher)
        for one, rows in zip(sets, own, strict=True):
            folder = (output or subject.folder) / one.name if output is None or len(sets) > 1 else output
            with shown(notes) as progress:
                result = bench.evaluate(
                    one, rows, settings, output=folder, progress=progress,
                    say=lambda text: notes.print(text, highlight=False, markup=False),
                )  # fmt: skip
            results.append({"model": subject.name, "folder": str(folder), **result.as_dict()})
            if not as_json:
                _print(subject.name, result, folder, console)
    if as_json:
        typer.echo(json.dumps(results, indent=2))


def _settings(
    seeds: str, greedy: bool, max_new_tokens: int, batch_size: int, rewards: bool, cuts: str
) -> EvaluationSettings:
    from dpkd.evaluation.evaluate import EvaluationSettings
    from dpkd.evaluation.lengths import parse_cuts
    from dpkd.text.settings import SamplingSettings

    parts = [part.strip() for part in seeds.split(",") if part.strip()]
    if not parts or not all(part.isascii() and part.isdigit() for part in parts) or len(set(parts)) < len(parts):
        raise SettingsError([f"--seeds {seeds!r}: expected different whole numbers with commas between, such as 10,20"])
    sampling = SamplingSettings(
        temperature=0.0 if greedy else 1.0, max_new_tokens=max_new_tokens, batch_size=batch_size
    )
    return EvaluationSettings(sampling, tuple(map(int, parts)), rewards, parse_cuts(cuts))


def _data(subject: Subject, one: Any, limit: int | None, set_: list[str] | None) -> Any:
    from dpkd.cli.options import data_settings

    own = dict(subject.data)
    if one.template is not None:
        own["template"] = one.template
    split = {"split": "test"} if one.path != one.name and not Path(one.path).exists() else {}
    return data_settings({**own, **split, "path": one.path, "limit": limit}, set_)


ABOUT = {
    "rouge_l": "stemmed, best over references, × 100", "exact_match": "%", "nll": "of the references, nats per token",
    "perplexity": "", "bits_per_byte": "", "teacher_nll": "nats per token",
    "forward_kl": "KL(teacher‖student), nats per token", "reverse_kl": "KL(student‖teacher), nats per token",
    "first_token_forward_kl": "at the first token", "first_token_reverse_kl": "at the first token",
    "reward_sum": "log q/p of the references", "reward_mean": "the same, per token",
}  # fmt: skip


def _print(name: str, result: Evaluation, folder: Path, console: Any) -> None:
    from rich import box
    from rich.table import Table

    seeds = (
        f"greedy, {result.rows} rows" if result.facts["greedy"] else f"{len(result.seeds)} seeds, {result.rows} rows"
    )
    table = Table(
        box=box.SIMPLE_HEAD, pad_edge=False, title=f"{name} on {result.facts['set']} ({seeds})", title_justify="left"
    )
    table.add_column("metric", no_wrap=True)
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("", style="dim")
    for key, metric in result.metrics.items():
        table.add_row(key.replace("_", " "), _cell(metric), ABOUT.get(key, metric.unit))
    console.print(table)
    if result.buckets:
        console.print(_by_length(result))
    read = result.facts["data"]["rows_read"]
    left = read - result.rows
    console.print(
        f"{read} rows read, {left} left out, {result.rows} scored under each seed"
        if left
        else f"{read} rows read, {result.rows} scored under each seed",
        highlight=False,
    )
    console.print(f"answers and scores: {folder}\n", highlight=False)


def _by_length(result: Evaluation) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(f"by reference length ({result.length_unit})", no_wrap=True)
    for bucket in result.buckets:
        table.add_column(bucket.label, justify="right", no_wrap=True)
    for key in ("rouge_l", "exact_match", "words"):
        table.add_row(key.replace("_", " "), *(_cell(bucket.metrics.get(key)) for bucket in result.buckets))
    table.add_row("rows", *(str(bucket.rows) for bucket in result.buckets))
    return table


def _cell(metric: Metric | None) -> str:
    if metric is None:
        return "–"
    digits = 2 if abs(metric.mean) >= 10 else 3
    return f"{metric.mean:.{digits}f}" + ("" if metric.sd is None else f" ± {metric.sd:.{digits}f}")
