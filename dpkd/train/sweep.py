"""The plan of `dpkd sweep`: a matrix of settings into runs, stage after stage, each run once."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator

from dpkd.config.layers import Layer, file_layer, flag_layer, get_path, merge, set_layer
from dpkd.config.problems import all_paths, checked, sentences
from dpkd.config.resolve import resolve
from dpkd.data.settings import DataSettings
from dpkd.errors import SettingsError
from dpkd.evaluation.evaluator import parse_seeds
from dpkd.evaluation.lengths import parse_cuts
from dpkd.plugins import Registry, load_registry
from dpkd.settings import Block

# {stage}: its model; {stage.path}: a setting of its run; {settings.path}: one of the sweep's settings for all runs.
PLACE = re.compile(r"\{([a-z][a-z0-9_-]*)(?:\.([a-zA-Z0-9_.]+))?\}")


SETTINGS = "settings"  # no stage's name


class Stage(Block):
    """Runs that differ in the values of a matrix.

    `{NAME}` in a value is the model of the stage of that name, `{NAME.train.lr}` a setting of its run, and
    `{settings.train.lr}` one of the sweep's own settings.
    """

    settings: dict[str, Any] = Field({}, description="settings of the stage, by dotted path")
    matrix: dict[str, list[Any]] = Field({}, description="dotted path → values: one run for each combination")
    best_by_dev: bool = Field(
        False, description="the run that is best by its dev.metric stands for the stage in `{NAME}` and `{NAME.path}`"
    )


class EvaluateOptions(Block):
    """How a set is scored; the options of `dpkd eval` of the same names."""

    seeds: int | str = Field("10,20,30,40,50", description="seeds of the answers, separated by commas")
    greedy: bool = Field(False, description="the likeliest token each time, under one seed")
    temperature: float = Field(1.0, ge=0, description="of the answers")
    top_p: float = Field(1.0, gt=0, le=1, description="nucleus")
    top_k: int = Field(0, ge=0, description="the k likeliest tokens; 0: all")
    max_new_tokens: int = Field(256, ge=1, description="length limit of an answer")
    batch_size: int = Field(32, ge=1, description="answers that are drawn together")
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = Field("float32", description="type of the weights")
    limit: int | None = Field(None, ge=1, description="read at most so many rows")
    template: Literal["auto", "alpaca", "chat", "none"] | None = Field(None, description="how a prompt is written")
    on_bad_row: Literal["error", "skip"] | None = Field(None, description="a row that cannot be read")
    long_prompts: Literal["error", "skip"] = Field("error", description="a prompt beyond the limits")
    rewards: bool = Field(False, description="also take the implicit reward of the answers")
    cuts: str = Field("30,70", description="ends of the buckets of reference length, in words")
    set: dict[str, Any] = Field({}, description="settings of the block `data`, by their name there")

    @field_validator("seeds")
    @classmethod
    def _are_seeds(cls, value: int | str) -> str:
        return ",".join(map(str, parse_seeds(str(value))))

    @field_validator("cuts")
    @classmethod
    def _are_cuts(cls, value: str) -> str:
        parse_cuts(value)
        return value

    @field_validator("set")
    @classmethod
    def _are_settings(cls, values: dict[str, Any]) -> dict[str, Any]:
        own = {name.removeprefix("data."): value for name, value in values.items()}
        checked(DataSettings, own, "data")
        return own


class EvaluateSettings(Block):
    """How every model of the last stages is scored."""

    data: list[str] = Field(description="sets, as for `dpkd eval --data`")
    stages: list[str] = Field([], description="stages whose runs are scored; none named: all")
    options: EvaluateOptions = Field(EvaluateOptions(), description="as for `dpkd eval`, such as `seeds: 10,20`")


class SweepSettings(Block):
    """A file of `dpkd sweep`."""

    output: str = Field(description="folder of the runs")
    config: list[str] = Field([], description="files of settings for all runs, relative to this file")
    settings: dict[str, Any] = Field({}, description="settings for all runs, by dotted path")
    stages: dict[str, Stage] = Field(description="stages by name; one that uses another's model comes after it")
    seeds: list[int] = Field(
        [], description="seeds of the stages that no other uses: all their runs with the first, then with the next"
    )
    override: dict[str, Any] = Field({}, description="settings over those of all stages, by dotted path")
    evaluate: EvaluateSettings | None = Field(None, description="how the models are scored; None: not at all")
    budget_minutes: float | None = Field(
        None, gt=0, description="no run begins that would end after this time, judged by the last three; None: any"
    )
    keep_checkpoints: bool = Field(True, description="False: delete those of finished runs, which cannot go on then")


# Whether a sweep works can be seen in minutes: every run and every evaluation, but nothing to learn from.
TINY: dict[str, Any] = {
    "train.steps": 2,
    "train.batch_size": 2,
    "train.micro_batch_size": 4,
    "train.warmup_steps": 0,
    "train.log_every": 1,
    "data.limit": 8,
    "dev.limit": 2,
    "dev.every": 1,
    "dev.max_new_tokens": 2,
    "text.sampling.max_new_tokens": 4,
    "text.teacher_sampling.max_new_tokens": 4,
}
TINY_EVALUATION: dict[str, Any] = {"seeds": "10,20", "limit": 3, "max_new_tokens": 4}

SWEEP_ONLY = frozenset(SweepSettings.model_fields) - {"settings"}


@dataclass(frozen=True)
class SweepRun:
    """One run: its folder, its settings by dotted path (places filled in), and the stages that it needs."""

    name: str
    stage: str
    folder: Path
    settings: Mapping[str, Any]
    needs: tuple[str, ...]
    turn: int = 0  # number of its seed: runs with the first one come before all others


@dataclass(frozen=True)
class Plan:
    """All runs of a sweep, in an order in which each comes after what it needs.

    Where a stage is decided by its best run, those that use it have the settings and the model of its first one until
    the best is known: see `stage_runs`.
    """

    settings: SweepSettings
    files: tuple[Path, ...]
    runs: tuple[SweepRun, ...]

    @property
    def stages(self) -> list[str]:
        """Names of the stages, in their order."""
        return list(dict.fromkeys(run.stage for run in self.runs))

    def needs(self, stage: str) -> list[str]:
        """Names of the stages that one uses."""
        return _needs(self.settings.stages[stage])

    def stage_runs(self, stage: str, best: Mapping[str, SweepRun]) -> list[SweepRun]:
        """The runs of a stage, given the runs that stand for earlier ones."""
        return list(_expanded(self.settings, stage, {run.stage: run for run in reversed(self.runs)} | dict(best)))

    def layers(self, run: SweepRun) -> list[Layer]:
        """Where the settings of a run come from."""
        layers = [file_layer(file) for file in self.files]
        layers += [flag_layer("the sweep", path, value) for path, value in run.settings.items()]
        return [*layers, flag_layer("the sweep", "output", str(run.folder))]

    def is_scored(self, run: SweepRun) -> bool:
        """Whether the model of a run is evaluated."""
        how = self.settings.evaluate
        return how is not None and (not how.stages or run.stage in how.stages)


def read_sweep(path: Path, assignments: Sequence[str] = (), *, tiny: bool = False) -> Plan:
    """Read a sweep and check the settings of every run; `tiny` makes all of it as short as can be.

    `assignments` are `PATH=VALUE` of the sweep's own (`output=`, `budget_minutes=`, `evaluate.options.limit=`), or of
    its settings for all runs. A student that is named there is taken as it is, not made of the teacher's layers.
    Raises SettingsError with all mistakes at once.
    """
    layer = file_layer(path, flag="")
    values = _assigned(dict(layer.values), assignments)
    try:
        settings = SweepSettings.model_validate(values)
    except ValidationError as error:
        raise SettingsError(sentences(error, merge([Layer(str(path), values)]), all_paths(SweepSettings))) from error
    settings = _tiny(settings) if tiny else settings
    files = tuple(path.parent / name for name in settings.config)
    runs: list[SweepRun] = []
    for stage in _ordered(settings):
        runs += _expanded(settings, stage, {run.stage: run for run in reversed(runs)})
    plan = Plan(settings, files, tuple(runs))
    _check(plan, load_registry())
    return plan


def _assigned(values: dict[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """The values of a sweep's file, with `PATH=VALUE` over them."""
    paths = [text.partition("=")[0].strip() for text in assignments]
    given = {path: get_path(layer.values, path) for path, layer in zip(paths, set_layer(assignments), strict=True)}
    if not isinstance(values.get("settings") or {}, Mapping):
        return values  # what is wrong with them is said with all other mistakes
    settings = dict(values.get("settings") or {})
    if given.get("student.model"):
        settings = {path: value for path, value in settings.items() if path not in ("student.init", "student.layers")}
    own = {path: value for path, value in given.items() if path.split(".")[0] in SWEEP_ONLY}
    settings |= {path: value for path, value in given.items() if path not in own}
    layers = [Layer("file", {**values, "settings": settings})]
    return merge([*layers, *(flag_layer("--set", path, value) for path, value in own.items())]).values


def _tiny(settings: SweepSettings) -> SweepSettings:
    how = settings.evaluate
    if how is not None:
        how = how.model_copy(update={"options": how.options.model_copy(update=TINY_EVALUATION)})
    return settings.model_copy(update={"override": {**TINY, **settings.override}, "evaluate": how})


def _places(values: Any) -> list[tuple[str, str]]:
    """Stage and setting (or nothing) of what is in braces, anywhere in some values."""
    if isinstance(values, str):
        return [(match[1], match[2] or "") for match in PLACE.finditer(values)]
    if isinstance(values, Mapping):
        return [place for value in values.values() for place in _places(value)]
    return [place for value in values for place in _places(value)] if isinstance(values, list) else []


def _needs(stage: Stage) -> list[str]:
    return list(dict.fromkeys(name for name, _ in _places(stage.model_dump()) if name != SETTINGS))


def _ordered(settings: SweepSettings) -> list[str]:
    """Stages, each after those that it uses. Raises SettingsError for unknown ones and for circles."""
    uses = {name: _needs(stage) for name, stage in settings.stages.items()}
    problems = [
        f"stages.{name}: uses {{{other}}}, but there is no such stage ({', '.join(uses)})"
        for name, others in uses.items()
        for other in others
        if other not in uses
    ]
    problems += [
        f"stages.{other}: {name} uses it, so it must be one run, without a matrix, or have `best_by_dev: true`"
        for name, others in uses.items()
        for other in others
        if other in uses and settings.stages[other].matrix and not settings.stages[other].best_by_dev
    ]
    problems += [
        f"stages.{name}: uses {{{other}.{path}}}, but {other} does not set it"
        for name, stage in settings.stages.items()
        for other, path in _places(stage.model_dump())
        if path and path not in (_own(settings, other) if other in uses else settings.settings)
    ]
    if problems:
        raise SettingsError(problems)
    order: list[str] = []
    while len(order) < len(uses):
        ready = [name for name in uses if name not in order and all(other in order for other in uses[name])]
        if not ready:
            rest = ", ".join(name for name in uses if name not in order)
            raise SettingsError([f"stages: {rest} wait for each other: a stage cannot use its own model"])
        order.append(ready[0])
    return order


def _own(settings: SweepSettings, stage: str) -> dict[str, Any]:
    """Settings of all runs of a stage, and the lists of those in which they differ."""
    return {**settings.settings, **settings.stages[stage].settings, **settings.stages[stage].matrix}


def _expanded(settings: SweepSettings, stage: str, standing: Mapping[str, SweepRun]) -> Iterable[SweepRun]:
    """The runs of a stage; `standing` are those that stand for the stages that it uses."""
    own = settings.stages[stage]
    used = {name for other in settings.stages.values() for name in _needs(other)}
    seeds = {"seed": settings.seeds} if settings.seeds and stage not in used else {}
    matrix = {**own.matrix, **seeds}
    for values in itertools.product(*matrix.values()):
        chosen = dict(zip(matrix, values, strict=True))
        parts = [stage, *(_label(path, value) for path, value in chosen.items())]
        folder = Path(settings.output) / "-".join(parts)
        base = SweepRun(SETTINGS, SETTINGS, folder, settings.settings, ())
        values_of = {**settings.settings, **own.settings, **chosen, **settings.override}
        filled = _filled(values_of, {**standing, SETTINGS: base})
        turn = settings.seeds.index(chosen["seed"]) if seeds else 0
        yield SweepRun(folder.name, stage, folder, filled, tuple(_needs(own)), turn)


def _label(path: str, value: Any) -> str:
    """A value as part of a folder's name: the loss by its name alone."""
    text = re.sub(r"[^A-Za-z0-9.]+", "_", str(value)).strip("_")
    return text if path in ("loss", "loss.name") else f"{path.rsplit('.', 1)[-1]}_{text}"


def _filled(value: Any, standing: Mapping[str, SweepRun]) -> Any:
    if isinstance(value, str):
        if (whole := PLACE.fullmatch(value)) and whole[2]:
            return standing[whole[1]].settings[whole[2]]  # a number stays one
        return PLACE.sub(lambda match: _place(standing[match[1]], match[2]), value)
    if isinstance(value, Mapping):
        return {key: _filled(part, standing) for key, part in value.items()}
    return [_filled(part, standing) for part in value] if isinstance(value, list) else value


def _place(run: SweepRun, path: str | None) -> str:
    return str(run.settings[path]) if path else str(run.folder / "model")


def _check(plan: Plan, registry: Registry) -> None:
    problems = []
    names = [run.name for run in plan.runs]
    problems += [
        f"two runs are called {name}: their settings differ in nothing"
        for name in sorted({name for name in names if names.count(name) > 1})
    ]
    found: dict[str, list[str]] = {}  # each problem with its runs: one mistake is often that of many
    for run in plan.runs:
        try:
            resolved = resolve(plan.layers(run), registry)
            if plan.settings.stages[run.stage].best_by_dev and resolved.settings.dev.path is None:
                raise SettingsError(["best_by_dev needs held-out rows: set dev.path"])
        except SettingsError as error:
            for problem in error.problems:
                found.setdefault(problem, []).append(run.name)
    problems += [f"{_listed(runs)}: {problem}" for problem, runs in found.items()]
    if problems:
        raise SettingsError(problems)


def _listed(runs: Sequence[str]) -> str:
    """Names of runs, the first of many."""
    first = ", ".join(runs[:2])
    return first if len(runs) <= 2 else f"{first} and {len(runs) - 2} more"
