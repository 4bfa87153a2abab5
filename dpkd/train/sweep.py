"""`dpkd sweep`: a matrix of settings into runs, stage after stage, each run once; failures are listed and not fatal."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from queue import Queue
from typing import Any

from pydantic import Field, ValidationError
from rich.console import Console

from dpkd.config.layers import Layer, file_layer, flag_layer
from dpkd.config.problems import all_paths, sentences
from dpkd.config.resolve import resolve
from dpkd.config.yaml_text import dump_value
from dpkd.errors import DpkdError, SettingsError, Stopped
from dpkd.io import lock, write_text
from dpkd.plugins import Registry, load_registry
from dpkd.run_folder import RunFolder
from dpkd.settings import Block
from dpkd.train.children import Children, children
from dpkd.train.progress import Display
from dpkd.train.resume import flat

PLACE = re.compile(r"\{([a-z][a-z0-9_-]*)\}")


class Stage(Block):
    """Runs that differ in the values of a matrix. `{NAME}` in a value is the model of the stage of that name."""

    settings: dict[str, Any] = Field({}, description="settings of the stage, by dotted path")
    matrix: dict[str, list[Any]] = Field({}, description="dotted path → values: one run for each combination")


class EvaluateSettings(Block):
    """How every model of the last stages is scored."""

    data: list[str] = Field(description="sets, as for `dpkd eval --data`")
    stages: list[str] = Field([], description="stages whose runs are scored; none named: all")
    options: dict[str, Any] = Field({}, description="further options of `dpkd eval`, such as `seeds: 10,20`")


class SweepSettings(Block):
    """A file of `dpkd sweep`."""

    output: str = Field(description="folder of the runs")
    config: list[str] = Field([], description="files of settings for all runs, relative to this file")
    settings: dict[str, Any] = Field({}, description="settings for all runs, by dotted path")
    stages: dict[str, Stage] = Field(description="stages by name; one that uses another's model comes after it")
    evaluate: EvaluateSettings | None = Field(None, description="how the models are scored; None: not at all")


@dataclass(frozen=True)
class SweepRun:
    """One run: its folder, its settings by dotted path (places filled in), and the stages that it needs."""

    name: str
    stage: str
    folder: Path
    settings: Mapping[str, Any]
    needs: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """All runs of a sweep, in an order in which each comes after what it needs."""

    settings: SweepSettings
    files: tuple[Path, ...]
    runs: tuple[SweepRun, ...]


@dataclass
class Outcome:
    """What became of the runs, by name; `failed` has the last line of each log."""

    done: list[str] = field(default_factory=list)
    found: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


def read_sweep(path: Path, registry: Registry | None = None) -> Plan:
    """Read a sweep and check the settings of every run. Raises SettingsError with all mistakes at once."""
    layer = file_layer(path)
    try:
        settings = SweepSettings.model_validate(dict(layer.values))
    except ValidationError as error:
        from dpkd.config.layers import merge

        raise SettingsError(sentences(error, merge([layer]), all_paths(SweepSettings))) from error
    files = tuple(path.parent / name for name in settings.config)
    order = _ordered(settings)
    runs = tuple(run for stage in order for run in _expanded(settings, stage))
    plan = Plan(settings, files, runs)
    _check(plan, registry or load_registry())
    return plan


def _needs(values: Any) -> list[str]:
    """Names of stages in braces, anywhere in some values."""
    if isinstance(values, str):
        return PLACE.findall(values)
    if isinstance(values, Mapping):
        return [name for value in values.values() for name in _needs(value)]
    return [name for value in values for name in _needs(value)] if isinstance(values, list) else []


def _ordered(settings: SweepSettings) -> list[str]:
    """Stages, each after those that it uses. Raises SettingsError for unknown ones and for circles."""
    uses = {name: list(dict.fromkeys(_needs(stage.model_dump()))) for name, stage in settings.stages.items()}
    problems = [
        f"stages.{name}: uses {{{other}}}, but there is no such stage ({', '.join(uses)})"
        for name, others in uses.items()
        for other in others
        if other not in uses
    ]
    problems += [
        f"stages.{other}: {name} uses its model, so it must be one run, without a matrix"
        for name, others in uses.items()
        for other in others
        if other in uses and settings.stages[other].matrix
    ]
    if problems:
        raise SettingsError(problems)
    order: list[str] = []
    while len(order) < len(uses):
        ready = [name for name in uses if name not in order and all(other in order for other in uses[name])]
        if not ready:
            rest = ", ".join(name for name in uses if name not in order)
            raise SettingsError([f"stages: {rest} wait for each other: a stage cannot use its own model"])
        order += ready
    return order


def _expanded(settings: SweepSettings, stage: str) -> Iterable[SweepRun]:
    own = settings.stages[stage]
    for values in itertools.product(*own.matrix.values()):
        chosen = dict(zip(own.matrix, values, strict=True))
        parts = [stage, *(_label(path, value) for path, value in chosen.items())]
        folder = Path(settings.output) / "-".join(parts)
        places = {name: str(Path(settings.output) / name / "model") for name in settings.stages}
        filled = _filled({**settings.settings, **own.settings, **chosen}, places)
        needs = tuple(dict.fromkeys(_needs(own.model_dump())))
        yield SweepRun(folder.name, stage, folder, filled, needs)


def _label(path: str, value: Any) -> str:
    """A value as part of a folder's name: the loss by its name alone."""
    text = re.sub(r"[^A-Za-z0-9.]+", "_", str(value)).strip("_")
    return text if path in ("loss", "loss.name") else f"{path.rsplit('.', 1)[-1]}_{text}"


def _filled(value: Any, places: Mapping[str, str]) -> Any:
    if isinstance(value, str):
        return PLACE.sub(lambda match: places[match[1]], value)
    if isinstance(value, Mapping):
        return {key: _filled(part, places) for key, part in value.items()}
    return [_filled(part, places) for part in value] if isinstance(value, list) else value


def _layers(plan: Plan, run: SweepRun) -> list[Layer]:
    layers = [file_layer(file) for file in plan.files]
    layers += [flag_layer("the sweep", path, value) for path, value in run.settings.items()]
    return [*layers, flag_layer("the sweep", "output", str(run.folder))]


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
            resolve(_layers(plan, run), registry)
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


def run_sweep(plan: Plan, *, devices: Sequence[str] = (), console: Console | None = None) -> Outcome:
    """Run what is not finished yet, in sequence, or one run on each device at a time; then score the models.

    A signal to stop is passed on: the runs that go on write a checkpoint and end, and so does the sweep. Raises Stopped
    then, and DpkdError when another process runs the same sweep.
    """
    display = Display(console or Console())
    output = Path(plan.settings.output)
    outcome = Outcome()
    slots: Queue[str | None] = Queue()
    for device in devices or (None,):
        slots.put(device)
    with (
        lock(output / ".lock", f"the sweep {output}"),
        children() as started,
        display.bar("sweep", len(plan.runs)),
        ThreadPoolExecutor(max(1, len(devices))) as pool,
    ):
        for stage in dict.fromkeys(run.stage for run in plan.runs):
            runs = [run for run in plan.runs if run.stage == stage]
            list(pool.map(lambda run: _one(plan, run, slots, outcome, display, started), runs))
    if started.stopped_by is not None:
        ended = len(outcome.done) + len(outcome.found)
        raise Stopped(
            f"the sweep stopped after {ended} of {len(plan.runs)} runs; call it again to go on", started.stopped_by
        )
    return outcome


def _one(
    plan: Plan, run: SweepRun, slots: Queue[str | None], outcome: Outcome, display: Display, started: Children
) -> None:
    device = slots.get()
    try:
        result = _result(plan, run, device, outcome, started)
        if started.stopped_by is None or run.name in (*outcome.done, *outcome.found):
            display.say(f"{run.name}: {result}")
    finally:
        slots.put(device)
    display.at(len(outcome.done) + len(outcome.found) + len(outcome.failed) + len(outcome.skipped))


def _result(plan: Plan, run: SweepRun, device: str | None, outcome: Outcome, started: Children) -> str:
    """Train one run and score it, where that is still to be done; what became of it, noted and in words."""
    folder = RunFolder(run.folder)
    if missing := [name for name in run.needs if not RunFolder(Path(plan.settings.output) / name).is_finished]:
        outcome.skipped[run.name] = f"needs {', '.join(missing)}, which failed"
        return f"skipped, {outcome.skipped[run.name]}"
    if reason := _changed(plan, run):
        outcome.failed[run.name] = reason
        return reason
    found = folder.is_finished
    if not found and (reason := _train(plan, run, device, started)):
        if started.stopped_by is None:
            outcome.failed[run.name] = reason
        return f"failed: {reason}"
    (outcome.found if found else outcome.done).append(run.name)
    if (reason := _evaluate(plan, run, device, started)) and started.stopped_by is None:
        outcome.failed[f"{run.name} (evaluation)"] = reason
        return f"its evaluation failed: {reason}"
    return "was there" if found else "done"


def _changed(plan: Plan, run: SweepRun) -> str | None:
    """Which settings the run in the folder has otherwise than the sweep now, as a sentence; None: it has them all."""
    config = RunFolder(run.folder).config
    if not config.is_file():
        return None
    wanted = flat(resolve(_layers(plan, run), load_registry()).as_dict())
    try:
        stored = flat(resolve([file_layer(config)], load_registry()).as_dict())
    except SettingsError as error:
        return f"{config} cannot be read: {'; '.join(error.problems)}. Delete {run.folder} to train this run again."
    differing = [
        f"{path} is {stored.get(path)!r} there and {wanted.get(path)!r} here"
        for path in sorted(wanted.keys() | stored.keys())
        if path != "output" and stored.get(path) != wanted.get(path)
    ]
    if not differing:
        return None
    return (
        f"{run.folder} holds a run with other settings: {'; '.join(differing[:5])}. Delete that folder to train it "
        "with the new ones, or give the sweep another `output`."
    )


def _train(plan: Plan, run: SweepRun, device: str | None, started: Children) -> str | None:
    """`dpkd train` in a process of its own; the reason when it failed."""
    if RunFolder(run.folder).config.is_file():
        settings = resolve(_layers(plan, run), load_registry()).settings
        trusted = settings.student.trust_remote_code or settings.teacher.trust_remote_code
        trust = ["--trust-remote-code"] if trusted else []
        return _command(["train", "--resume", str(run.folder), *trust], run, device, started)
    own = Path(plan.settings.output) / f"{run.name}.yaml"
    write_text(own, _as_yaml(run.settings))
    files = [part for file in (*plan.files, own) for part in ("--config", str(file))]
    return _command(["train", *files, "--output", str(run.folder)], run, device, started)


def _as_yaml(settings: Mapping[str, Any]) -> str:
    """Settings by dotted path as a file of nested blocks."""
    nested: dict[str, Any] = {}
    for path, value in settings.items():
        *above, last = path.split(".")
        block = nested
        for key in above:
            block = block.setdefault(key, {})
        block[last] = value
    return "".join(f"{key}: {dump_value(value)}\n" for key, value in nested.items())


def _evaluate(plan: Plan, run: SweepRun, device: str | None, started: Children) -> str | None:
    how = plan.settings.evaluate
    if how is None or (how.stages and run.stage not in how.stages):
        return None
    options = [part for name, value in how.options.items() for part in _option(name, value)]
    sets = [part for name in how.data for part in ("--data", name)]
    return _command(["eval", "--model", str(run.folder), *sets, *options], run, device, started)


def _option(name: str, value: Any) -> list[str]:
    flag = f"--{name.replace('_', '-')}"
    if isinstance(value, bool):
        return [flag] if value else []
    return [flag, str(value)]


def _command(arguments: Sequence[str], run: SweepRun, device: str | None, started: Children) -> str | None:
    """Run `dpkd ...`; its output goes to NAME.log. Returns the last line when it fails."""
    environment = dict(os.environ)
    if device is not None:
        environment["CUDA_VISIBLE_DEVICES"] = device
    log = run.folder.with_name(f"{run.name}.log")
    with log.open("a", encoding="utf-8") as file:
        file.write(f"$ dpkd {' '.join(arguments)}\n")
        file.flush()
        began = time.monotonic()
        code = started.run(arguments, stdout=file, stderr=subprocess.STDOUT, env=environment)
        file.write(f"# exit {code}, {time.monotonic() - began:.0f} s\n")
    if code == 0:
        return None
    lines = [line for line in log.read_text(encoding="utf-8").splitlines() if line.strip() and not line.startswith("#")]
    return f"{lines[-1].strip()} ({log})" if lines else f"exit code {code} ({log})"


def summary(outcome: Outcome) -> str:
    """What became of the runs, in lines. Raises DpkdError, after all was tried, when any failed."""
    parts = [f"{len(outcome.done)} runs done, {len(outcome.found)} were there"]
    if not outcome.failed and not outcome.skipped:
        return parts[0]
    parts += [f"failed: {name}: {reason}" for name, reason in outcome.failed.items()]
    parts += [f"skipped: {name}: {reason}" for name, reason in outcome.skipped.items()]
    raise DpkdError("\n".join([*parts, "Fix the failed runs and rerun; finished runs are skipped."]))
