"""The runs of a sweep, one after another in this process, or each in a process of its own; failures are not fatal."""

from __future__ import annotations

import gc
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from queue import Queue
from types import FrameType
from typing import Any, Protocol

import torch
from rich.console import Console

from dpkd.api import SamplingSettings
from dpkd.config.layers import file_layer
from dpkd.config.problems import checked
from dpkd.config.resolve import resolve
from dpkd.config.yaml_text import dump_value
from dpkd.data.settings import DataSettings
from dpkd.errors import DpkdError, SettingsError, Stopped
from dpkd.evaluation.evaluator import EvaluationSettings, Evaluator, metric_specs, parse_seeds
from dpkd.evaluation.lengths import WORDS, parse_cuts
from dpkd.evaluation.sets import find_set
from dpkd.evaluation.target import find_target
from dpkd.io import open_log, read_json, write_json, write_text
from dpkd.locks import lock
from dpkd.models.shared import Shared
from dpkd.plugins import Registry, load_registry
from dpkd.report.card import rescore
from dpkd.run_folder import RunFolder, SweepFolder
from dpkd.run_metrics import read_metrics
from dpkd.settings import flat
from dpkd.train.accelerate_state import own_accelerate_state
from dpkd.train.children import Children
from dpkd.train.dev import direction_of
from dpkd.train.interrupt import on_stop
from dpkd.train.progress import Display
from dpkd.train.resume import resume_folder
from dpkd.train.run import train
from dpkd.train.sweep import EvaluateOptions, Plan, SweepRun
from dpkd.train.timings import Timings


class Runner(Protocol):
    """How a run is trained and scored: None when that went well, the reason when it failed; raises Stopped."""

    def train(self, plan: Plan, run: SweepRun, device: str | None) -> str | None: ...

    def evaluate(self, plan: Plan, run: SweepRun, device: str | None) -> str | None: ...


@dataclass
class SweepOutcome:
    """What became of the runs, by name: reasons for those that failed or were skipped; `left` came too late."""

    done: list[str] = field(default_factory=list)
    found: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)

    @property
    def tried(self) -> int:
        """How many runs were looked at."""
        return sum(map(len, (self.done, self.found, self.failed, self.skipped, self.left)))

    def of(self, name: str) -> tuple[str, str]:
        """State of a run (`waiting` where it was not looked at yet), and the reason for it, if any."""
        if name in self.done or name in self.found:
            return "finished", ""
        if reason := self.failed.get(name):
            return "failed", reason
        if reason := self.failed.get(f"{name} (evaluation)"):
            return "not scored", reason
        if reason := self.skipped.get(name):
            return "skipped", reason
        return ("left", "no time was left") if name in self.left else ("waiting", "")


def run_sweep(
    plan: Plan,
    *,
    devices: Sequence[str] = (),
    isolate: bool = False,
    registry: Registry | None = None,
    console: Console | None = None,
) -> SweepOutcome:
    """Run what is not finished yet, and score the models.

    One run follows another in this process, and shares what was loaded for those before it. With `isolate`, or on
    `devices` (one run on each at a time), each has a process of its own. A signal to stop reaches the runs that go on:
    they write a checkpoint and end, and so does the sweep. Raises Stopped then, and DpkdError when another process runs
    the same sweep.
    """
    output = Path(plan.settings.output)
    registry = registry or load_registry()
    handler: Children | StopSignal = Children() if isolate or devices else StopSignal()
    best: dict[str, SweepRun] = {}
    with (
        lock(output / ".lock", f"the sweep {output}"),
        on_stop(handler) as heard,
        _Sweep(
            plan,
            Isolated(heard, registry) if isinstance(heard, Children) else InProcess(registry),
            registry,
            Display(console or Console(file=sys.stdout)),
        ).on(devices) as sweep,
        ThreadPoolExecutor(max(1, len(devices))) as pool,
    ):
        try:
            for turn in range(max(1, len(plan.settings.seeds))):
                for stage in plan.stages:
                    runs = [run for run in plan.stage_runs(stage, best) if run.turn == turn]
                    if devices:
                        list(pool.map(sweep.one, runs))
                    else:
                        for run in runs:
                            sweep.one(run)
                    if turn == 0 and plan.settings.stages[stage].best_by_dev:
                        best |= sweep.best(stage, runs)
        except (KeyboardInterrupt, Stopped) as error:
            number = heard.stopped_by or (error.exit_code - 128 if isinstance(error, Stopped) else signal.SIGINT)
            ended = len(sweep.outcome.done) + len(sweep.outcome.found)
            raise Stopped(
                f"the sweep stopped after {ended} of {len(plan.runs)} runs; call it again to go on", number
            ) from error
    return sweep.outcome


@dataclass
class _Sweep:
    """A sweep that goes on."""

    plan: Plan
    runner: Runner
    registry: Registry
    display: Display
    outcome: SweepOutcome = field(default_factory=SweepOutcome)
    slots: Queue[str | None] = field(default_factory=Queue)
    began: float = field(default_factory=time.monotonic)
    lasted: deque[float] = field(default_factory=lambda: deque(maxlen=3))  # seconds of the last runs
    without_best: set[str] = field(default_factory=set)
    writing: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def on(self, devices: Sequence[str]) -> Iterator[_Sweep]:
        """The sweep, one run on each device at a time, with a bar."""
        for device in devices or (None,):
            self.slots.put(device)
        self._record()
        with self.display.bar("sweep", len(self.plan.runs)):
            yield self

    def one(self, run: SweepRun) -> None:
        """Train and score one run, where that is still to be done."""
        device = self.slots.get()
        try:
            if said := self._result(run, device):
                self.display.say(f"{run.name}: {said}")
        finally:
            self.slots.put(device)
        self._record()
        self.display.at(self.outcome.tried)

    def _record(self) -> None:
        """Write down what became of each run so far, for whoever reads the folder."""
        with self.writing:
            rows = [
                {
                    "name": run.name,
                    "stage": run.stage,
                    "scored": self.plan.is_scored(run),
                    "state": state,
                    "reason": why,
                }
                for run in self.plan.runs
                for state, why in [self.outcome.of(run.name)]
            ]
            write_json(SweepFolder(Path(self.plan.settings.output)).record, {"runs": rows})

    def best(self, stage: str, runs: Sequence[SweepRun]) -> dict[str, SweepRun]:
        """The run of a stage that is best by its dev.metric, if any has finished; says so, and writes it down."""
        values = {run.name: value for run in runs if (value := self._dev(run)) is not None}
        if not values:
            self.without_best.add(stage)
            return {}
        metric = resolve(self.plan.layers(runs[0]), self.registry).settings.dev.metric
        sign = direction_of(metric, metric_specs(self.registry))
        chosen = max((run for run in runs if run.name in values), key=lambda run: sign * values[run.name])
        own = {path: chosen.settings[path] for path in self.plan.settings.stages[stage].matrix}
        self.display.say(
            f"{stage}: best by dev {metric} is {', '.join(f'{path}={value}' for path, value in own.items())} ("
            + ", ".join(f"{name} {value:.4g}" for name, value in values.items())
            + ")"
        )
        file = SweepFolder(Path(self.plan.settings.output)).choices
        known = read_json(file, "Delete it: the sweep writes it again.") if file.is_file() else {}
        write_json(file, {**known, stage: {"metric": metric, "chosen": own, "run": chosen.name, "values": values}})
        return {stage: chosen}

    def _dev(self, run: SweepRun) -> float | None:
        """The value of dev.metric that decided a finished run's model; None where no value was finite."""
        file = run.folder / "dev.jsonl"
        if not RunFolder(run.folder).is_finished or not file.is_file():
            return None
        metric = resolve(self.plan.layers(run), self.registry).settings.dev.metric
        sign = direction_of(metric, metric_specs(self.registry))
        values = [sign * float(row[metric]) for row in read_metrics(file) if metric in row]
        return sign * max(filter(math.isfinite, values)) if any(map(math.isfinite, values)) else None

    def _result(self, run: SweepRun, device: str | None) -> str:
        folder, began = RunFolder(run.folder), time.monotonic()
        missing = [name for name in run.needs if name in self.without_best or not self._has_model(name)]
        if reason := self._changed(run):
            self.outcome.failed[run.name] = reason
            return reason
        found = folder.is_finished
        if not found and (self._is_late() or any(self._was_left(name) for name in missing)):
            self.outcome.left.append(run.name)
            return ""
        if missing:
            self.outcome.skipped[run.name] = f"needs {', '.join(missing)}, which failed"
            return f"skipped, {self.outcome.skipped[run.name]}"
        if not found and (reason := self.runner.train(self.plan, run, device)):
            self.outcome.failed[run.name] = reason
            return f"failed: {reason}"
        if self.plan.is_scored(run) and (reason := self.runner.evaluate(self.plan, run, device)):
            self.outcome.failed[f"{run.name} (evaluation)"] = reason
            return f"its evaluation failed: {reason}"
        (self.outcome.found if found else self.outcome.done).append(run.name)
        if not self.plan.settings.keep_checkpoints:
            shutil.rmtree(folder.checkpoints, ignore_errors=True)
        if found:
            return "was there"
        self.lasted.append(time.monotonic() - began)
        return f"done in {time.monotonic() - began:.0f} s{_in_short(run)}"

    def _changed(self, run: SweepRun) -> str | None:
        """Which settings the folder's run has otherwise than the sweep now, as a sentence; None: it has them all."""
        config = RunFolder(run.folder).config
        if not config.is_file():
            return None
        wanted = flat(resolve(self.plan.layers(run), self.registry).as_dict())
        try:
            stored = flat(resolve([file_layer(config)], self.registry).as_dict())
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

    def _has_model(self, stage: str) -> bool:
        first = next(run for run in self.plan.runs if run.stage == stage)
        if self.plan.settings.stages[stage].best_by_dev:
            return True
        return RunFolder(first.folder).is_finished

    def _was_left(self, stage: str) -> bool:
        return any(run.stage == stage and run.name in self.outcome.left for run in self.plan.runs)

    def _is_late(self) -> bool:
        """Whether another run would end after the time that there is."""
        budget = self.plan.settings.budget_minutes
        return budget is not None and time.monotonic() - self.began + max(self.lasted, default=0.0) > 60 * budget


def _in_short(run: SweepRun) -> str:
    """The main scores of a run, where it has any."""
    parts = []
    for file in sorted(run.folder.glob("eval/*/scores.json")):
        metrics = read_json(file)["metrics"]
        shown = [("Rouge-L", "rouge_l"), ("fKL", "forward_kl"), ("rKL", "reverse_kl")]
        parts += [f"{short} {metrics[name]['mean']:.3f}" for short, name in shown if name in metrics]
    return "".join(f"  {part}" for part in parts)


class InProcess:
    """Runs in this process, which share models, tokenizers and tokenized rows."""

    def __init__(self, registry: Registry) -> None:
        self.registry, self.shared = registry, Shared()

    def train(self, plan: Plan, run: SweepRun, device: str | None) -> str | None:
        left = sum(not RunFolder(one.folder).is_finished for one in plan.runs)
        given = replace(self.shared, runs_left=left)

        def train_it(console: Console) -> None:
            timings = Timings(on=True)
            if RunFolder(run.folder).config.is_file():
                resume_folder(
                    run.folder,
                    trust_remote_code=_is_trusted(plan, run, self.registry),
                    given=given,
                    registry=self.registry,
                    console=console,
                    timings=timings,
                )
            else:
                with timings("config"):
                    resolved = resolve(plan.layers(run), self.registry, given)
                kept = plan.settings.keep_checkpoints
                train(resolved, console=console, timings=timings, last_checkpoint=kept)

        return self._logged(run, f"dpkd train, output {run.folder}", train_it)

    def evaluate(self, plan: Plan, run: SweepRun, device: str | None) -> str | None:
        how = plan.settings.evaluate
        assert how is not None
        return self._logged(
            run, "dpkd eval", lambda console: _score(run, how.data, how.options, self.registry, self.shared, console)
        )

    def _logged(self, run: SweepRun, title: str, work: Callable[[Console], None]) -> str | None:
        """Do it, with what it says in NAME.log. Returns what it failed of; stops go on."""
        began = time.monotonic()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        with open_log(log_of(run)) as file:
            file.write(f"$ {title}\n")
            try:
                with own_accelerate_state():
                    work(Console(file=file, width=120))
                reason = None
            except Stopped:
                raise
            except DpkdError as error:
                reason = str(error)
                file.write(f"{reason}\n")
            except Exception as error:  # a plugin's, or ours: the other runs go on
                traceback.print_exc(file=file)
                reason = f"{type(error).__name__}: {error}"
            finally:
                gc.collect()  # models and optimizers of the run refer to each other
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
            file.write(f"# {'failed' if reason else 'done'}, {time.monotonic() - began:.1f} s\n")
        return f"{reason.splitlines()[-1]} ({log_of(run)})" if reason else None


def _score(
    run: SweepRun, sets: Sequence[str], options: EvaluateOptions, registry: Registry, shared: Shared, console: Console
) -> None:
    """What `dpkd eval --model RUN` does."""
    target = find_target(str(run.folder), None)
    sampling = SamplingSettings(
        temperature=0.0 if options.greedy else options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        max_new_tokens=options.max_new_tokens,
        batch_size=options.batch_size,
    )
    how = EvaluationSettings(
        sampling,
        parse_seeds(str(options.seeds)),
        options.rewards,
        parse_cuts(options.cuts),
        WORDS,
        options.long_prompts,
    )
    given = {"limit": options.limit, "template": options.template, "on_bad_row": options.on_bad_row, **options.set}
    found = [find_set(name) for name in sets]
    if all((target.folder / one.name / "scores.json").is_file() for one in found):
        return
    evaluator = Evaluator(target.model, target.teacher, dtype=options.dtype, given=shared, registry=registry)
    for one in found:
        rows = checked(DataSettings, one.given(target.data, given), "data")
        evaluator.evaluate(one.name, rows, how, output=target.folder / one.name, say=console.print)
    rescore(run.folder)


def _is_trusted(plan: Plan, run: SweepRun, registry: Registry) -> bool:
    """Whether the sweep itself, not a run's folder, allows code that comes with a model."""
    settings = resolve(plan.layers(run), registry).settings
    return settings.student.trust_remote_code or settings.teacher.trust_remote_code


class Isolated:
    """Each run, and each evaluation, in a process of its own."""

    def __init__(self, started: Children, registry: Registry) -> None:
        self.started, self.registry = started, registry

    def train(self, plan: Plan, run: SweepRun, device: str | None) -> str | None:
        if RunFolder(run.folder).config.is_file():
            trust = ["--trust-remote-code"] if _is_trusted(plan, run, self.registry) else []
            return self._command(["train", "--resume", str(run.folder), *trust], run, device)
        own = run.folder.with_name(f"{run.name}.yaml")
        write_text(own, _as_yaml(run))
        files = [part for file in (*plan.files, own) for part in ("--config", str(file))]
        return self._command(["train", *files, "--output", str(run.folder)], run, device)

    def evaluate(self, plan: Plan, run: SweepRun, device: str | None) -> str | None:
        how = plan.settings.evaluate
        assert how is not None
        given = how.options.model_dump(mode="json", exclude_unset=True, exclude={"set"})
        options = [part for name, value in given.items() for part in _option(name, value)]
        options += [part for name, value in how.options.set.items() for part in ("--set", f"data.{name}={value}")]
        sets = [part for name in how.data for part in ("--data", name)]
        return self._command(["eval", "--model", str(run.folder), *sets, *options], run, device)

    def _command(self, arguments: Sequence[str], run: SweepRun, device: str | None) -> str | None:
        """Run `dpkd ...`; its output goes to NAME.log. Returns the last line of a failure; raises Stopped."""
        environment = dict(os.environ)
        if device is not None:
            environment["CUDA_VISIBLE_DEVICES"] = device
        log = log_of(run)
        with open_log(log) as file:
            file.write(f"$ dpkd {' '.join(arguments)}\n")
            file.flush()
            began = time.monotonic()
            code = self.started.run(arguments, stdout=file, stderr=subprocess.STDOUT, env=environment)
            file.write(f"# exit {code}, {time.monotonic() - began:.0f} s\n")
        if code == 0:
            return None
        if self.started.stopped_by is not None:
            raise Stopped(f"{run.name} was stopped", self.started.stopped_by)
        lines = [line for line in log.read_text(encoding="utf-8").splitlines() if line.strip() and line[0] != "#"]
        return f"{lines[-1].strip()} ({log})" if lines else f"exit code {code} ({log})"


def _as_yaml(run: SweepRun) -> str:
    """Settings by dotted path as a file of nested blocks."""
    nested: dict[str, Any] = {}
    for path, value in run.settings.items():
        *above, last = path.split(".")
        block = nested
        for key in above:
            block = block.setdefault(key, {})
        block[last] = value
    return "".join(f"{key}: {dump_value(value)}\n" for key, value in nested.items())


def _option(name: str, value: Any) -> list[str]:
    flag = f"--{name.replace('_', '-')}"
    if isinstance(value, bool):
        return [flag] if value else []
    return [] if value is None else [flag, str(value)]


def log_of(run: SweepRun) -> Path:
    """Where a run says what it does: beside its folder, which must be empty when it begins."""
    return run.folder.with_name(f"{run.name}.log")


@dataclass
class StopSignal:
    """The signal that asked the sweep to stop: it ends at once, where no run catches the signal.

    A run that trains has its own handler meanwhile, and writes a checkpoint; loading and scoring can be done again.
    """

    stopped_by: int | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.stopped_by = number
        raise KeyboardInterrupt


def summary(outcome: SweepOutcome) -> str:
    """What became of the runs, in lines. Raises DpkdError, after all was tried, when any failed."""
    parts = [f"{len(outcome.done)} runs done, {len(outcome.found)} were there"]
    if outcome.left:
        parts.append(f"left, as the time was over: {', '.join(outcome.left)}; call the sweep again to go on")
    if not outcome.failed and not outcome.skipped:
        return "\n".join(parts)
    parts += [f"failed: {name}: {reason}" for name, reason in outcome.failed.items()]
    parts += [f"skipped: {name}: {reason}" for name, reason in outcome.skipped.items()]
    raise DpkdError("\n".join([*parts, "Fix the failed runs and rerun; finished runs are skipped."]))
