"""`dpkd eval`."""

from __future__ import annotations

import json
from collections import Counter
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dpkd.cli.options import SetData, data_settings
from dpkd.cli.score import Unit
from dpkd.errors import SettingsError

if TYPE_CHECKING:
    from rich.console import Console

    from dpkd.data.settings import DataSettings
    from dpkd.evaluation.evaluate import EvaluationSettings
    from dpkd.evaluation.results import Evaluation
    from dpkd.evaluation.sets import EvalSet
    from dpkd.evaluation.subject import Subject

__all__ = ["evaluate"]


class OnRow(StrEnum):
    """What to do with a row that cannot be scored."""

    ERROR = "error"
    SKIP = "skip"


class DType(StrEnum):
    """The type of the weights."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    AUTO = "auto"


class Template(StrEnum):
    """How a prompt is written."""

    AUTO = "auto"
    ALPACA = "alpaca"
    CHAT = "chat"
    NONE = "none"


def evaluate(
    model: Annotated[list[str], typer.Option(help="run folder, model folder or hub id; repeatable")],
    data: Annotated[
        list[str],
        typer.Option(help="a file, folder, hub id, or dolly, self-inst, vicuna, sinst, uinst; repeatable"),
    ],
    teacher: Annotated[
        str | None, typer.Option(help="for the divergences; a run brings its own", show_default=False)
    ] = None,
    seeds: Annotated[str, typer.Option(help="seeds of the sampling")] = "10,20,30,40,50",
    greedy: Annotated[bool, typer.Option("--greedy", help="decode greedily, once, instead of sampling")] = False,
    temperature: Annotated[float, typer.Option(help="of the sampling", min=0.0)] = 1.0,
    top_p: Annotated[float, typer.Option(help="nucleus", min=0.0, max=1.0)] = 1.0,
    top_k: Annotated[int, typer.Option(help="0: all tokens", min=0)] = 0,
    max_new_tokens: Annotated[int, typer.Option(help="length limit of an answer", min=1)] = 256,
    batch_size: Annotated[int, typer.Option(help="answers written together", min=1)] = 32,
    dtype: Annotated[
        DType, typer.Option(help="of the weights; half precision is faster, but answers depend on the batch")
    ] = DType.FLOAT32,
    limit: Annotated[int | None, typer.Option(help="only the first rows", min=1, show_default=False)] = None,
    template: Annotated[
        Template | None, typer.Option(help="how a prompt is written [default: the set's, else the run's, else auto]")
    ] = None,
    on_bad_row: Annotated[
        OnRow | None, typer.Option(help="a row that cannot be read: stop, or leave it out and count it")
    ] = None,
    long_prompts: Annotated[
        OnRow, typer.Option(help="a prompt beyond data.max_prompt_tokens or the model: stop, or leave it out and count")
    ] = OnRow.ERROR,
    set_: SetData = None,
    sets_folder: Annotated[
        str | None,
        typer.Option(help="where the papers' sets are [default: $DPKD_SETS, else the hub]", show_default=False),
    ] = None,
    cuts: Annotated[str, typer.Option(help="ends of the buckets of reference length; '': none")] = "30,70",
    unit: Annotated[Unit, typer.Option(help="what the cuts count; tokens: the model's")] = Unit.WORDS,
    rewards: Annotated[
        bool, typer.Option("--rewards", help="also the implicit reward of the model's and the teacher's answers")
    ] = False,
    output: Annotated[
        Path | None, typer.Option(help="folder of the results [default: RUN/eval/SET]", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of tables")] = False,
) -> None:
    """Score models on held-out rows: Rouge-L, exact match, likelihood, divergence to the teacher; mean ± sd.

    Every row that is read is scored under every seed, or the command says which are not. An interrupted evaluation
    goes on where it stopped: call it again.
    """
    from rich.console import Console

    from dpkd.cli.scores_table import print_overview, print_scores
    from dpkd.evaluation.sets import find_set
    from dpkd.evaluation.subject import find_subject
    from dpkd.report.rescore import rescore

    sampling = {
        "temperature": 0.0 if greedy else temperature, "top_p": top_p, "top_k": top_k,
        "max_new_tokens": max_new_tokens, "batch_size": batch_size,
    }  # fmt: skip
    settings = _settings(seeds, sampling, rewards, cuts, unit, long_prompts)
    sets = [find_set(name, sets_folder) for name in data]
    subjects = [find_subject(name, teacher) for name in model]
    flags = {"limit": limit, "template": template and template.value, "on_bad_row": on_bad_row and on_bad_row.value}
    rows = {(s.name, one.name): data_settings(one.given(s.data, flags), set_) for s in subjects for one in sets}
    folders = _folders(subjects, sets, output)
    console, notes = Console(), Console(stderr=True)
    results: list[tuple[str, Evaluation]] = []
    for subject in subjects:
        own = {one.name: (rows[subject.name, one.name], folders[subject.name, one.name]) for one in sets}
        for name, result in _scored(subject, own, settings, dtype, notes):
            results.append((subject.name, result))
            if not as_json:
                print_scores(subject.name, result, folders[subject.name, name], console)
        if output is None:
            rescore(subject.folder.parent)  # a run's card has the scores of all its sets
    if as_json:
        typer.echo(json.dumps([result.as_dict() for _, result in results], indent=2))
    elif len(results) > 1:
        print_overview(results, console)


def _scored(
    subject: Subject,
    sets: dict[str, tuple[DataSettings, Path]],
    settings: EvaluationSettings,
    dtype: DType,
    notes: Console,
) -> Any:
    """The results of one model, set by set; the model is loaded once."""
    from dpkd.cli.progress import shown
    from dpkd.evaluation.evaluate import Bench

    bench = Bench(subject.model, subject.teacher, dtype=dtype.value)
    for name, (rows, folder) in sets.items():
        with shown(notes) as progress:
            yield name, bench.evaluate(
                name, rows, settings, output=folder, progress=progress,
                say=lambda text: notes.print(text, highlight=False, markup=False, soft_wrap=True),
            )  # fmt: skip


def _settings(
    seeds: str, sampling: dict[str, Any], rewards: bool, cuts: str, unit: Unit, long_prompts: OnRow
) -> EvaluationSettings:
    from dpkd.config.problems import checked
    from dpkd.evaluation.evaluate import EvaluationSettings
    from dpkd.evaluation.lengths import WORDS, parse_cuts
    from dpkd.text.settings import SamplingSettings

    parts = [part.strip() for part in seeds.split(",") if part.strip()]
    if not parts or not all(part.isascii() and part.isdigit() for part in parts) or len(set(parts)) < len(parts):
        raise SettingsError([f"--seeds {seeds!r}: expected different whole numbers with commas between, such as 10,20"])
    return EvaluationSettings(
        checked(SamplingSettings, sampling, "sampling"), tuple(map(int, parts)), rewards, parse_cuts(cuts),
        WORDS if unit is Unit.WORDS else None, long_prompts.value,
    )  # fmt: skip


def _folders(subjects: list[Subject], sets: list[EvalSet], output: Path | None) -> dict[tuple[str, str], Path]:
    """Where the results of each model on each set go: no two of them in one folder.

    Raises SettingsError when two of the models, or of the sets, would be filed under one name.
    """
    if output is not None and len(subjects) > 1:
        raise SettingsError([f"--output {output}: names the folder of one model; with several, each has its own"])
    problems = [
        f"--{flag}: {', '.join(same)} would all be filed under {name}: evaluate them one by one, with --output"
        for flag, pairs in (
            ("model", [(str(s.folder), s.name) for s in subjects]),
            ("data", [(one.name, one.path) for one in sets]),
        )
        for name, count in Counter(name for name, _ in pairs).items()
        if count > 1
        for same in [[given for filed, given in pairs if filed == name]]
    ]
    if problems:
        raise SettingsError(problems)
    return {
        (s.name, one.name): output if output is not None and len(sets) == 1 else (output or s.folder) / one.name
        for s in subjects
        for one in sets
    }
