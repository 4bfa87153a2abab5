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
    from dpkd.evaluation.evaluator import EvaluationSettings, Evaluator
    from dpkd.evaluation.results import Evaluation
    from dpkd.evaluation.sets import EvalSet
    from dpkd.evaluation.target import EvalTarget


def evaluate(
    model: flags.Models,
    data: flags.Sets = None,
    tasks: flags.Tasks = None,
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
    include_path: flags.IncludePath = None,
    num_fewshot: flags.NumFewshot = None,
    output: flags.Output = None,
    as_json: flags.AsJson = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Score models on held-out rows: Rouge-L, exact match, likelihood, divergence to the teacher; mean ± sd.

    With --tasks on standard benchmarks too, or alone. Every row that is read is scored under every seed, or the command
    says which are not. An interrupted evaluation of rows goes on where it stopped: call it again.
    """
    sampling = {
        "temperature": 0.0 if greedy else temperature,
        "top_p": top_p,
        "top_k": top_k,
        "max_new_tokens": max_new_tokens,
        "batch_size": batch_size,
    }
    given = {"limit": limit, "template": template and template.value, "on_bad_row": on_bad_row and on_bad_row.value}
    names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    if not data and not names:
        raise SettingsError(["--data or --tasks: what should the model be scored on? Name at least one set or task"])
    with waiting("starting"):
        settings = _settings(seeds, sampling, rewards, cuts, unit, long_prompts)
        jobs = _jobs(model, teacher, data or [], sets_folder, given, set_, output, trust_remote_code)
        benchmarks = _Benchmarks.of(names, include_path, num_fewshot, limit, template, batch_size)
    results = _all_scored(jobs, settings, benchmarks, dtype.value, shown=not as_json, rescored=output is None)
    _print_together(results, as_json)


@dataclass(frozen=True)
class _Job:
    """A model, and the sets that it is scored on: name → rows, and where the results go; those of tasks in `folder`."""

    target: EvalTarget
    sets: Mapping[str, tuple[DataSettings, Path]]
    folder: Path


@dataclass(frozen=True)
class _Benchmarks:
    """The tasks that every model is scored on, loaded, and how; `template`: None, that of the model's run."""

    tasks: Mapping[str, Any]
    settings: Mapping[str, Any]
    template: str | None

    @classmethod
    def of(
        cls,
        names: Sequence[str],
        include: Path | None,
        num_fewshot: int | None,
        limit: int | None,
        template: flags.Template | None,
        batch_size: int,
    ) -> _Benchmarks:
        """Load the tasks. Raises DpkdError where that is impossible."""
        from dpkd.evaluation.tasks import load_tasks

        settings = {"num_fewshot": num_fewshot, "limit": limit, "batch_size": batch_size}
        return cls(load_tasks(names, include) if names else {}, settings, template and template.value)

    def scored(self, evaluator: Evaluator, job: _Job) -> Iterator[tuple[Evaluation, Path]]:
        """The results of a model, and the folder of each."""
        from dpkd.evaluation.tasks import TaskSettings, score_task

        template = self.template or job.target.data.get("template") or "auto"
        settings = TaskSettings(**self.settings, template=template)
        for name, loaded in self.tasks.items():
            yield from score_task(evaluator, name, loaded, settings, job.folder)


def _jobs(
    models: Sequence[str],
    teacher: str | None,
    data: Sequence[str],
    sets_folder: str | None,
    given: dict[str, Any],
    assignments: list[str] | None,
    output: Path | None,
    trust_remote_code: bool,
) -> list[_Job]:
    """What is to be scored on what. Raises SettingsError or DpkdError before anything is loaded."""
    from dpkd.evaluation.sets import find_set
    from dpkd.evaluation.target import find_target

    sets = [find_set(name, sets_folder) for name in data]
    targets = [find_target(name, teacher, trust_remote_code=trust_remote_code) for name in models]
    rows = {(s.name, one.name): data_settings(one.given(s.data, given), assignments) for s in targets for one in sets}
    folders = _folders(targets, sets, output)
    return [
        _Job(s, {one.name: (rows[s.name, one.name], folders[s.name, one.name]) for one in sets}, output or s.folder)
        for s in targets
    ]


def _all_scored(
    jobs: Sequence[_Job],
    settings: EvaluationSettings,
    benchmarks: _Benchmarks,
    dtype: str,
    *,
    shown: bool,
    rescored: bool,
) -> list[tuple[str, Evaluation]]:
    """Every model on all it is scored on, each model loaded once; `rescored`: a run's card gets the scores."""
    from rich.console import Console

    from dpkd.cli.scores_table import print_scores
    from dpkd.report.card import rescore

    console, notes = Console(), Console(stderr=True)
    results = []
    for job in jobs:
        for result, folder in _scored(job, settings, benchmarks, dtype, notes):
            results.append((job.target.name, result))
            if shown:
                print_scores(job.target.name, result, folder, console)
        if rescored:
            rescore(job.target.folder.parent)
    return results


def _scored(
    job: _Job, settings: EvaluationSettings, benchmarks: _Benchmarks, dtype: str, notes: Console
) -> Iterator[tuple[Evaluation, Path]]:
    """The results of one model, set by set and task by task, and the folder of each."""
    from dpkd.cli.progress import shown
    from dpkd.evaluation.evaluator import Evaluator

    evaluator = Evaluator(job.target.model, job.target.teacher if job.sets else None, dtype=dtype)
    for name, (rows, folder) in job.sets.items():
        with shown(notes) as progress:
            result = evaluator.evaluate(
                name,
                rows,
                settings,
                output=folder,
                progress=progress,
                say=lambda text: notes.print(printable(text), highlight=False, markup=False, soft_wrap=True),
            )
        yield result, folder  # once the bars are closed: what is printed then begins a line of its own
    yield from benchmarks.scored(evaluator, job)


def _print_together(results: list[tuple[str, Evaluation]], as_json: bool) -> None:
    """All results as JSON, or those of several models or sets as one table: benchmarks have metrics of their own."""
    from rich.console import Console

    from dpkd.cli.scores_table import print_overview

    if as_json:
        typer.echo(json.dumps([result.as_dict() for _, result in results], indent=2))
        return
    on_sets = [(name, result) for name, result in results if "task" not in result.facts]
    if len(on_sets) > 1:
        print_overview(on_sets, Console())


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
