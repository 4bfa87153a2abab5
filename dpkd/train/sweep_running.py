"""The runs of a sweep, one after another in this process, or each in a process of its own; failures are not fatal."""

from __future__ import annotations

import math
import shutil
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from queue import Queue
from types import FrameType

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
from dpkd.train.interrupt import on_stop
from dpkd.train.progress import Display
from dpkd.train.sweep import Plan, SweepRun
from dpkd.train.sweep_runners import InProcess, Isolated, check_evaluation, log_of


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

    One run follows another in this process, and shares what was loaded for those before it. With `isolate`, or on
    `devices` (one run on each at a time), each has a process of its own. A signal to stop reaches the runs that go on:
    they write a checkpoint and end, and so does the sweep. Raises Stopped then, and DpkdError when another process runs
    the same sweep, or when the models could not be scored.
    """
    output = Path(plan.settings.output)
    registry = load_registry()
    handler: Children | StopSignal = Children() if isolate or devices else StopSignal()
    best: dict[str, SweepRun] = {}
    with (
        folder_lock(output, what=f"the sweep {output}"),
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
            check_evaluation(plan, registry)
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
    runner: InProcess | Isolated
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
            return "failed: its folder holds a run with other settings"
        found = folder.is_finished
        if not found and (self._is_late() or any(self._was_left(name) for name in missing)):
            self.outcome.left.append(run.name)
            return ""
        if missing:
            self.outcome.skipped[run.name] = f"needs {', '.join(missing)}, which failed"
            return f"skipped, {self.outcome.skipped[run.name]}"
        if not found and (reason := self.runner.train(self.plan, run, device)):
            self.outcome.failed[run.name] = reason
            return f"failed, see {log_of(run)}"
        if self.plan.is_scored(run) and (reason := self.runner.evaluate(self.plan, run, device)):
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
