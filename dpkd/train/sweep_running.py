"""The runs of a sweep, one after another in this process, or each in a process of its own; failures are not fatal."""

from __future__ import annotations

import math
import shutil
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from queue import LifoQueue
from typing import Any, TypeVar

from rich.console import Console

from dpkd.config.layers import file_layer
from dpkd.config.resolve import resolve
from dpkd.errors import DpkdError, SettingsError, Stopped
from dpkd.evaluation.evaluator import metric_specs
from dpkd.io import read_json, write_json
from dpkd.locks import folder_lock
from dpkd.plugins import Registry, load_registry
from dpkd.run_folder import RunFolder, SweepFolder
from dpkd.run_metrics import read_metrics
from dpkd.settings import flat
from dpkd.train.children import Children
from dpkd.train.dev import direction_of
from dpkd.train.interrupt import StopSignal, on_stop
from dpkd.train.progress import Display
from dpkd.train.sweep import Plan, SweepRun
from dpkd.train.sweep_runners import InProcess, Isolated, Runner, check_evaluation, log_of
from dpkd.train.sweep_worker import Worker

T = TypeVar("T")


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
    plan: Plan, *, devices: Sequence[str] = (), isolate: bool = False, console: Console | None = None
) -> SweepOutcome:
    """Run what is not finished yet, and score the models.

    One run follows another in this process, and shares what was loaded for those before it. With `devices` there is
    such a process for each of them, side by side; one that is named twice has two. With `isolate` each run has a
    process of its own. A signal to stop reaches the runs that go on: they write a checkpoint and end, and so does the
    sweep. Raises Stopped then, and DpkdError when another process runs the same sweep, or when the models could not be
    scored.
    """
    output = Path(plan.settings.output)
    registry = load_registry()
    handler: Children | StopSignal = Children() if isolate or devices else StopSignal()
    with (
        folder_lock(output, what=f"the sweep {output}"),
        on_stop(handler) as heard,
        ThreadPoolExecutor(len(devices)) if devices else _AtOnce() as pool,
        _Sweep(
            plan, _runners(handler, devices, isolate, registry), registry, Display(console or Console(file=sys.stdout))
        ).begun() as sweep,
    ):
        try:
            check_evaluation(plan, registry)
            sweep.all(pool)
        except (KeyboardInterrupt, Stopped) as error:
            number = heard.stopped_by or (error.exit_code - 128 if isinstance(error, Stopped) else signal.SIGINT)
            ended = len(sweep.outcome.done) + len(sweep.outcome.found)
            raise Stopped(
                f"the sweep stopped after {ended} of {len(plan.runs)} runs; call it again to go on", number
            ) from error
    return sweep.outcome


def _runners(handler: Children | StopSignal, devices: Sequence[str], isolate: bool, registry: Registry) -> list[Runner]:
    """What makes the runs, one for each that may go on at a time."""
    if not isinstance(handler, Children):
        return [InProcess(registry)]
    if isolate:
        beside = devices or (None,)
        return [Isolated(handler, registry, device, len(beside)) for device in beside]
    return [Worker(handler, device, number, len(devices)) for number, device in enumerate(devices, 1)]


class _AtOnce(Executor):
    """Does what it is given before anything else, in the thread that gives it."""

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        done: Future[T] = Future()
        done.set_result(fn(*args, **kwargs))
        return done


@dataclass
class _Sweep:
    """A sweep that goes on."""

    plan: Plan
    runners: Sequence[Runner]
    registry: Registry
    display: Display
    outcome: SweepOutcome = field(default_factory=SweepOutcome)
    free: LifoQueue[Runner] = field(default_factory=LifoQueue)  # what has loaded models is taken first
    began: float = field(default_factory=time.monotonic)
    lasted: deque[float] = field(default_factory=lambda: deque(maxlen=3))  # seconds of the last runs
    going: dict[str, list[tuple[SweepRun, Future[None]]]] = field(default_factory=dict)  # by stage
    over: set[str] = field(default_factory=set)  # stages
    best: dict[str, SweepRun] = field(default_factory=dict)  # that stand for their stages
    without_best: set[str] = field(default_factory=set)
    writing: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def begun(self) -> Iterator[_Sweep]:
        """The sweep, with a bar; in the end what made the runs is closed."""
        self._record()
        try:
            for runner in reversed(self.runners):
                runner.begin(self.plan)
                self.free.put(runner)
            with self.display.bar("sweep", len(self.plan.runs)):
                yield self
        finally:
            for runner in self.runners:
                runner.close()

    def all(self, pool: Executor) -> None:
        """Give a pool all runs of all stages, those of a stage as soon as the stages that it needs are over.

        Runs with the first seed come before any with the second.
        """
        try:
            for turn in range(max(1, len(self.plan.settings.seeds))):
                left = list(self.plan.stages)
                while left:
                    self._close_stages()
                    free = (stage for stage in left if stage not in self.going)
                    ready = next((stage for stage in free if self.over.issuperset(self.plan.needs(stage))), None)
                    if ready is None:
                        self._wait()
                        continue
                    left.remove(ready)
                    runs = [run for run in self.plan.stage_runs(ready, self.best) if run.turn == turn]
                    self.going[ready] = [(run, pool.submit(self.one, run)) for run in runs]
            while self.going:
                self._wait()
                self._close_stages()
        finally:  # after a mistake or a signal: nothing more begins, and what goes on comes to its end
            futures = [future for runs in self.going.values() for _, future in runs]
            wait([future for future in futures if not future.cancel()])

    def _wait(self) -> None:
        """Wait for the end of a run that goes on."""
        going = [future for runs in self.going.values() for _, future in runs if not future.done()]
        for future in wait(going, return_when=FIRST_COMPLETED).done:
            future.result()

    def _close_stages(self) -> None:
        """Those whose runs have all ended are over: the best run stands for its stage from now on."""
        for stage in [stage for stage, runs in self.going.items() if all(future.done() for _, future in runs)]:
            runs = [run for run, future in self.going.pop(stage) if future.result() is None]
            if stage not in self.over and self.plan.settings.stages[stage].best_by_dev:
                self._choose(stage, runs)
            self.over.add(stage)

    def one(self, run: SweepRun) -> None:
        """Train and score one run, where that is still to be done."""
        runner = self.free.get()
        try:
            if said := self._result(run, runner):
                self.display.say(f"{run.name}: {said}")
        finally:
            self.free.put(runner)
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

    def _choose(self, stage: str, runs: Sequence[SweepRun]) -> None:
        """Have the run of a stage that is best by its dev.metric, if any has finished, stand for it; say so."""
        values = {run.name: value for run in runs if (value := self._dev(run)) is not None}
        if not values:
            self.without_best.add(stage)
            return
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
        self.best[stage] = chosen

    def _dev(self, run: SweepRun) -> float | None:
        """The value of dev.metric that decided a finished run's model; None where no value was finite."""
        file = run.folder / "dev.jsonl"
        if not RunFolder(run.folder).is_finished or not file.is_file():
            return None
        metric = resolve(self.plan.layers(run), self.registry).settings.dev.metric
        sign = direction_of(metric, metric_specs(self.registry))
        values = [sign * float(row[metric]) for row in read_metrics(file) if metric in row]
        return sign * max(filter(math.isfinite, values)) if any(map(math.isfinite, values)) else None

    def _result(self, run: SweepRun, runner: Runner) -> str:
        folder, began = RunFolder(run.folder), time.monotonic()
        missing = [name for name in run.needs if name in self.without_best or not self._has_model(name)]
        if reason := self._changed(run):
            self.outcome.failed[run.name] = reason
            return "failed: its folder holds a run with other settings"
        found = folder.is_finished
        if not found and (self._is_late() or any(self._was_left(name) for name in missing)):
            self.outcome.left.append(run.name)
            return ""
        if missing:
            self.outcome.skipped[run.name] = f"needs {', '.join(missing)}, which failed"
            return f"skipped, {self.outcome.skipped[run.name]}"
        if not found and (reason := runner.train(self.plan, run)):
            self.outcome.failed[run.name] = reason
            return f"failed, see {log_of(run)}"
        if self.plan.is_scored(run) and (reason := runner.evaluate(self.plan, run)):
            self.outcome.failed[f"{run.name} (evaluation)"] = reason
            return f"its evaluation failed, see {log_of(run)}"
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
        return self.plan.settings.stages[stage].best_by_dev or RunFolder(first.folder).is_finished

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
