"""How one run of a sweep is trained and scored: in this process, with what the runs share, or in one of its own."""

from __future__ import annotations

import gc
import math
import subprocess
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from dpkd.api import SamplingSettings
from dpkd.config.problems import checked
from dpkd.config.resolve import Resolved, resolve
from dpkd.config.yaml_text import dump_value
from dpkd.data.settings import DataSettings
from dpkd.data.templates import with_chat_template
from dpkd.data.wording import SWEEP
from dpkd.errors import DpkdError, Stopped
from dpkd.evaluation.evaluator import EvaluationSettings, Evaluator, parse_seeds
from dpkd.evaluation.inputs import read_inputs
from dpkd.evaluation.lengths import WORDS, parse_cuts
from dpkd.evaluation.sets import EvalSet, find_set
from dpkd.evaluation.target import find_target
from dpkd.io import open_log, write_text
from dpkd.models.in_memory import InMemory
from dpkd.models.loading import context_length
from dpkd.models.settings import ModelSettings
from dpkd.models.shared import Shared
from dpkd.models.tokenizers import difference
from dpkd.plugins import Registry
from dpkd.report.card import rescore
from dpkd.run_folder import RunFolder
from dpkd.train.accelerate_state import own_accelerate_state
from dpkd.train.children import Children, environment
from dpkd.train.resume import resume_folder
from dpkd.train.run import train
from dpkd.train.sweep import EvaluateOptions, Plan, SweepRun
from dpkd.train.timings import Timings


class Runner(ABC):
    """What makes runs, one at a time.

    `train` and `evaluate` return None when that went well, the reason when it failed, and raise Stopped.
    """

    @abstractmethod
    def train(self, plan: Plan, run: SweepRun) -> str | None:
        """Train a run, from its beginning or from its last checkpoint."""

    @abstractmethod
    def evaluate(self, plan: Plan, run: SweepRun) -> str | None:
        """Score its model."""

    def begin(self, plan: Plan) -> None:  # noqa: B027 - most have nothing to do
        """Called before the first run."""

    def close(self) -> None:  # noqa: B027
        """Called after the last one."""


class InProcess(Runner):
    """Runs in this process, which share models, tokenizers and tokenized rows."""

    def __init__(self, registry: Registry, workers: int = 1) -> None:
        """`workers`: how many processes share the runs of the sweep."""
        self.registry, self.shared, self.workers = registry, Shared(), workers

    def train(self, plan: Plan, run: SweepRun) -> str | None:
        left = sum(not RunFolder(one.folder).is_finished for one in plan.runs)
        in_memory = replace(self.shared, runs_left=math.ceil(left / self.workers))

        def train_it(console: Console) -> None:
            timings = Timings(on=True)
            if RunFolder(run.folder).config.is_file():
                resume_folder(
                    run.folder,
                    trust_remote_code=_is_trusted(plan, run, self.registry),
                    in_memory=in_memory,
                    registry=self.registry,
                    console=console,
                    timings=timings,
                )
            else:
                with timings("config"):
                    resolved = resolve(plan.layers(run), self.registry, in_memory)
                kept = plan.settings.keep_checkpoints
                train(resolved, console=console, timings=timings, last_checkpoint=kept)

        return self._logged(run, f"dpkd train, output {run.folder}", train_it)

    def evaluate(self, plan: Plan, run: SweepRun) -> str | None:
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
        SWEEP,
    )
    found = [find_set(name) for name in sets]
    if all((target.folder / one.name / "scores.json").is_file() for one in found):
        return
    evaluator = Evaluator(target.model, target.teacher, dtype=options.dtype, in_memory=shared, registry=registry)
    for one in found:
        rows = _rows(one, target.data, options)
        evaluator.evaluate(one.name, rows, how, output=target.folder / one.name, say=console.print)
    rescore(run.folder)


def _rows(one: EvalSet, own: Mapping[str, Any], options: EvaluateOptions) -> DataSettings:
    """The rows of a set; `own` is what the model's run says of them."""
    given = {"limit": options.limit, "template": options.template, "on_bad_row": options.on_bad_row, **options.set}
    return checked(DataSettings, one.given(own, given), "data")


def check_evaluation(plan: Plan, registry: Registry) -> None:
    """Read the sets for every model that is still to be scored, before the first of them is trained.

    Raises DpkdError for a set that cannot be found or scored. A model that cannot be looked at is left to its run.
    """
    how, seen = plan.settings.evaluate, set()
    sets = [find_set(name) for name in how.data] if how is not None else []
    for run in filter(plan.is_scored, plan.runs):
        assert how is not None
        if all((run.folder / "eval" / one.name / "scores.json").is_file() for one in sets):
            continue
        resolved = resolve(plan.layers(run), registry)
        own = {key: value for key, value in resolved.as_dict()["data"].items() if key in ("template", "columns")}
        begins = [_begins_from(model, plan, registry) for model in (_own_model(resolved), resolved.settings.teacher)]
        key = (*(model.model_dump_json() for model in begins), str(own), resolved.settings.data.chat_template)
        if key in seen:
            continue
        seen.add(key)
        try:
            tokenizer, context = _read_by(*begins)
            tokenizer = with_chat_template(tokenizer, resolved.settings.data.chat_template)
        except DpkdError:
            continue
        for one in sets:
            try:
                read_inputs(
                    _rows(one, own, how.options),
                    tokenizer,
                    context=context,
                    max_new_tokens=how.options.max_new_tokens,
                    long_prompts=how.options.long_prompts,
                    wording=SWEEP,
                )
            except DpkdError as error:
                raise DpkdError(f"nothing was begun, as {run.name} could not be scored: {error}") from error


def _own_model(resolved: Resolved) -> ModelSettings:
    """What a student is made of."""
    settings = resolved.settings
    return settings.student if settings.student.model is not None else settings.teacher


def _begins_from(model: ModelSettings, plan: Plan, registry: Registry) -> ModelSettings:
    """The model itself, or, where a run of the sweep is still to make it, what that run begins from."""
    makers = {str(run.folder / "model"): run for run in plan.runs if not RunFolder(run.folder).is_finished}
    while (run := makers.get(model.model or "")) is not None:
        model = _own_model(resolve(plan.layers(run), registry))
    return model


def _read_by(student: ModelSettings, teacher: ModelSettings) -> tuple[Any, int | None]:
    """The tokenizer of a student, and the longest sequence that it and its teacher read. Raises DpkdError."""
    files = InMemory()
    if student.model is None:
        raise DpkdError("the student is not made of a model")
    tokenizer, configs = files.tokenizer(student), [files.config(student)]
    served = getattr(teacher, "server", None) is not None
    if teacher.model is not None and not served and difference(tokenizer, files.tokenizer(teacher)) is None:
        configs.append(files.config(teacher))
    return tokenizer, min((n for config in configs if (n := context_length(config)) is not None), default=None)


def _is_trusted(plan: Plan, run: SweepRun, registry: Registry) -> bool:
    """Whether the sweep itself, not a run's folder, allows code that comes with a model."""
    settings = resolve(plan.layers(run), registry).settings
    return settings.student.trust_remote_code or settings.teacher.trust_remote_code


class Isolated(Runner):
    """Each run, and each evaluation, in a process of its own, on one device if one is named."""

    def __init__(self, started: Children, registry: Registry, device: str | None = None, workers: int = 1) -> None:
        """One of so many `workers`."""
        self.started, self.registry, self.device, self.workers = started, registry, device, workers

    def train(self, plan: Plan, run: SweepRun) -> str | None:
        if RunFolder(run.folder).config.is_file():
            trust = ["--trust-remote-code"] if _is_trusted(plan, run, self.registry) else []
            return self._command(["train", "--resume", str(run.folder), *trust], run)
        own = run.folder.with_name(f"{run.name}.yaml")
        write_text(own, _as_yaml(run))
        files = [part for file in (*plan.files, own) for part in ("--config", str(file))]
        return self._command(["train", *files, "--output", str(run.folder)], run)

    def evaluate(self, plan: Plan, run: SweepRun) -> str | None:
        how = plan.settings.evaluate
        assert how is not None
        given = how.options.model_dump(mode="json", exclude_unset=True, exclude={"set"})
        options = [part for name, value in given.items() for part in _option(name, value)]
        options += [part for name, value in how.options.set.items() for part in ("--set", f"data.{name}={value}")]
        sets = [part for name in how.data for part in ("--data", name)]
        return self._command(["eval", "--model", str(run.folder), *sets, *options], run)

    def _command(self, arguments: Sequence[str], run: SweepRun) -> str | None:
        """Run `dpkd ...`; its output goes to NAME.log. Returns the last line of a failure; raises Stopped."""
        log = log_of(run)
        with open_log(log) as file:
            file.write(f"$ dpkd {' '.join(arguments)}\n")
            file.flush()
            began = time.monotonic()
            own = environment(self.device, self.workers)
            code = self.started.run(arguments, stdout=file, stderr=subprocess.STDOUT, env=own)
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
