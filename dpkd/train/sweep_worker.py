"""A process for one device that makes one run of a sweep after another, so that they share what they load.

Parent and worker speak in lines of JSON: the plan first; then `{"do": "train", "run": ...}`, answered by
`{"reason": null}`, by why it failed, or by the signal that stopped the worker.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO, cast

from dpkd.errors import Stopped
from dpkd.io import open_log
from dpkd.plugins import load_registry
from dpkd.run_folder import SweepFolder
from dpkd.train.children import Children, environment
from dpkd.train.interrupt import StopSignal, on_stop
from dpkd.train.sweep import Plan, SweepRun, SweepSettings
from dpkd.train.sweep_runners import InProcess, Runner


class Worker(Runner):
    """Has `InProcess` do the work in a process of its own, and starts another one where it died."""

    def __init__(self, started: Children, device: str, number: int, workers: int) -> None:
        """The `number`th of so many `workers`; several of them may share a device."""
        self.started, self.device, self.number, self.workers = started, device, number, workers
        self._process: subprocess.Popen[str] | None = None

    def begin(self, plan: Plan) -> None:
        """Start the process, so that it imports what it needs while the first runs go on elsewhere."""
        self._start(plan)

    def train(self, plan: Plan, run: SweepRun) -> str | None:
        return self._ask("train", plan, run)

    def evaluate(self, plan: Plan, run: SweepRun) -> str | None:
        return self._ask("evaluate", plan, run)

    def close(self) -> None:
        """Let the process end, and wait for that."""
        if self._process is not None:
            self._end(self._process)

    def _ask(self, what: str, plan: Plan, run: SweepRun) -> str | None:
        answer: dict[str, Any] | None = None
        process = self._process or self._start(plan)
        if process is not None:
            with suppress(OSError):  # it has ended
                _write(cast(TextIO, process.stdin), {"do": what, "run": _as_json(run)})
                line = cast(TextIO, process.stdout).readline()
                answer = json.loads(line) if line else None
        if answer is not None and "stopped" not in answer:
            reason: str | None = answer["reason"]
            return reason
        code = self._end(process) if process is not None else 0
        number = answer["stopped"] if answer is not None else self.started.stopped_by
        if number is not None:
            raise Stopped(f"{run.name} was stopped", number)
        return f"its process ended with exit code {code}, see {self._log(plan)}"

    def _log(self, plan: Plan) -> Path:
        return SweepFolder(Path(plan.settings.output)).worker_log(self.number)

    def _end(self, process: subprocess.Popen[str]) -> int:
        """Wait for the end of a process that is told nothing more, and return its exit code."""
        self._process = None
        for pipe in (process.stdin, process.stdout):
            with suppress(OSError):  # nobody reads what is left in it
                cast(TextIO, pipe).close()
        return self.started.ended(process)

    def _start(self, plan: Plan) -> subprocess.Popen[str] | None:
        with open_log(self._log(plan)) as file:
            process = self.started.start(
                __name__,
                [str(self.workers)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                env=environment(self.device, self.workers),
            )
        if process is not None:
            self._process = process
            with suppress(OSError):  # what it died of is said by the first answer
                _write(cast(TextIO, process.stdin), _plan_as_json(plan))
        return process


def main() -> None:
    """What a worker does: the runs that it is told to, until its input ends."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever a library prints is no answer
    with on_stop(StopSignal()) as heard:
        try:
            plan = _plan(json.loads(sys.stdin.readline()))
            runner = InProcess(load_registry(), workers=int(sys.argv[1]))
            for line in sys.stdin:
                told = json.loads(line)
                work = runner.train if told["do"] == "train" else runner.evaluate
                _write(answers, {"reason": work(plan, _run(told["run"]))})
        except (KeyboardInterrupt, Stopped) as error:
            number = error.exit_code - 128 if isinstance(error, Stopped) else heard.stopped_by
            _write(answers, {"stopped": number})
            sys.exit(128 + (number or 0))


def _write(stream: TextIO, values: dict[str, Any]) -> None:
    stream.write(json.dumps(values) + "\n")
    stream.flush()


def _as_json(run: SweepRun) -> dict[str, Any]:
    return {**asdict(run), "folder": str(run.folder)}


def _run(values: dict[str, Any]) -> SweepRun:
    return SweepRun(**{**values, "folder": Path(values["folder"]), "needs": tuple(values["needs"])})


def _plan_as_json(plan: Plan) -> dict[str, Any]:
    return {
        "settings": plan.settings.model_dump(mode="json"),
        "files": [str(file) for file in plan.files],
        "runs": [_as_json(run) for run in plan.runs],
    }


def _plan(values: dict[str, Any]) -> Plan:
    settings = SweepSettings.model_validate(values["settings"])
    return Plan(settings, tuple(map(Path, values["files"])), tuple(map(_run, values["runs"])))
