"""`dpkd eval`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from dpkd.cli import evaluate_options as flags
from dpkd.cli.options import SetData, TrustRemoteCode, data_settings
from dpkd.cli.progress import waiting
from dpkd.cli.score import Unit
from dpkd.errors import SettingsError, printable

if TYPE_CHECKING:
    from rich.console import Console

    from dpkd.data.settings import DataSettings
    from dpkd.evaluation.evaluator import EvaluationSettings
    from dpkd.evaluation.results import Evaluation
    from dpkd.evaluation.sets import EvalSet
    from dpkd.evaluation.target import EvalTarget


def evaluate(
    model: flags.Models,
    data: flags.Sets,
    teacher: flags.Teacher = None,
    seeds: flags.Seeds = "10,20,30,40,50",
    greedy: flags.Greedy = False,
    temperature: flags.Temperature = 1.0,
    top_p: flags.TopP = 1.0,
    top_k: flags.TopK = 0,
    max_new_tokens: flags.MaxNewTokens = 256,
    batch_size: flags.BatchSize = 32,
    dtype: flags.Weights = flags.DType.FLOAT32,
    limit: flags.Limit = None,
    template: flags.TemplateFlag = None,
    on_bad_row: flags.OnBadRow = None,
    long_prompts: flags.LongPrompts = flags.OnRow.ERROR,
    set_: SetData = None,
    sets_folder: flags.SetsFolder = None,
    cuts: flags.Cuts = "30,70",
    unit: flags.UnitFlag = Unit.WORDS,
    rewards: flags.Rewards = False,
    output: flags.Output = None,
    as_json: flags.AsJson = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Score models on held-out rows: Rouge-L, exact match, likelihood, divergence to the teacher; mean ± sd.

    Every row that is read is scored under every seed, or the command says which are not. An interrupted evaluation
    goes on where it stopped: call it again.
    """
    sampling = {
        "temperature": 0.0 if greedy else temperature,
        "top_p": top_p,
        "top_k": top_k,
        "max_new_tokens": max_new_tokens,
        "batch_size": batch_size,
    }
    given = {"limit": limit, "template": template and template.value, "on_bad_row": on_bad_row and on_bad_row.value}
    with waiting("starting"):
        settings = _settings(seeds, sampling, rewards, cuts, unit, long_prompts)
        tasks = _tasks(model, teacher, data, sets_folder, given, set_, output, trust_remote_code)
    results = _all_scored(tasks, settings, dtype.value, shown=not as_json, rescored=output is None)
    _print_together(results, as_json)


@dataclass(frozen=True)
class _Task:
    """A model, and the sets that it is scored on: name → rows, and where the results go."""

    target: EvalTarget
    sets: Mapping[str, tuple[DataSettings, Path]]


def _tasks(
    models: Sequence[str],
    teacher: str | None,
    data: Sequence[str],
    sets_folder: str | None,
    given: dict[str, Any],
    assignments: list[str] | None,
    output: Path | None,
    trust_remote_code: bool,
) -> list[_Task]:
    """What is to be scored on what. Raises SettingsError or DpkdError before anything is loaded."""
    from dpkd.evaluation.sets import find_set
    from dpkd.evaluation.target import find_target

    sets = [find_set(name, sets_folder) for name in data]
    targets = [find_target(name, teacher, trust_remote_code=trust_remote_code) for name in models]
    rows = {(s.name, one.name): data_settings(one.given(s.data, given), assignments) for s in targets for one in sets}
    folders = _folders(targets, sets, output)
    return [_Task(s, {one.name: (rows[s.name, one.name], folders[s.name, one.name]) for one in sets}) for s in targets]


def _all_scored(
    tasks: Sequence[_Task], settings: EvaluationSettings, dtype: str, *, shown: bool, rescored: bool
) -> list[tuple[str, Evaluation]]:
    """Every model on every set, each model loaded once; `rescored`: a run's card gets the scores of all its sets."""
    from rich.console import Console

    from dpkd.cli.scores_table import print_scores
    from dpkd.report.card import rescore

    console, notes = Console(), Console(stderr=True)
    results = []
    for task in tasks:
        name = task.target.name
        for set_name, result in _scored(task, settings, dtype, notes):
            results.append((name, result))
            if shown:
                print_scores(name, result, task.sets[set_name][1], console)
        if rescored:
            rescore(task.target.folder.parent)
    return results


def _scored(task: _Task, settings: EvaluationSettings, dtype: str, notes: Console) -> Iterator[tuple[str, Evaluation]]:
    """The results of one model, set by set."""
    from dpkd.cli.progress import shown
    from dpkd.evaluation.evaluator import Evaluator

    evaluator = Evaluator(task.target.model, task.target.teacher, dtype=dtype)
    for name, (rows, folder) in task.sets.items():
        with shown(notes) as progress:
            result = evaluator.evaluate(
                name,
                rows,
                settings,
                output=folder,
                progress=progress,
                say=lambda text: notes.print(printable(text), highlight=False, markup=False, soft_wrap=True),
            )
        yield name, result  # once the bars are closed: what is printed then begins a line of its own


def _print_together(results: list[tuple[str, Evaluation]], as_json: bool) -> None:
    """All results as JSON, or those of several models or sets as one table."""
    from rich.console import Console

    from dpkd.cli.scores_table import print_overview

    if as_json:
        typer.echo(json.dumps([result.as_dict() for _, result in results], indent=2))
    elif len(results) > 1:
        print_overview(results, Console())


def _settings(
    seeds: str, sampling: dict[str, Any], rewards: bool, cuts: str, unit: Unit, long_prompts: flags.OnRow
) -> EvaluationSettings:
    from dpkd.api import SamplingSettings
    from dpkd.config.problems import checked
    from dpkd.evaluation.evaluator import EvaluationSettings, parse_seeds
    from dpkd.evaluation.lengths import WORDS, parse_cuts

    return EvaluationSettings(
        checked(SamplingSettings, sampling, "sampling"),
        parse_seeds(seeds),
        rewards,
        parse_cuts(cuts),
        WORDS if unit is Unit.WORDS else None,
        long_prompts.value,
    )


def _folders(targets: list[EvalTarget], sets: list[EvalSet], output: Path | None) -> dict[tuple[str, str], Path]:
    """Where the results of each model on each set go: no two of them in one folder.

    Raises SettingsError when two of the models, or of the sets, would be filed under one name.
    """
    if output is not None and len(targets) > 1:
        raise SettingsError(
            [f"--output {output}: is the folder of a single model; several models have their default folders"]
        )
    problems = [
        f"--{flag}: {', '.join(same)} would all be saved under {name}: evaluate them one by one, with --output"
        for flag, pairs in (
            ("model", [(str(s.folder), s.name) for s in targets]),
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
        for s in targets
        for one in sets
    }
