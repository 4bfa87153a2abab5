"""Standard benchmarks (GSM8K, IFEval, MMLU, ...) by EleutherAI's lm-eval: the tasks and their metrics are its own.

Scores are those that lm-eval reports, stored as `dpkd eval` stores its own, so that all tools read them. The scores of
single rows are kept where the metric is their mean: `dpkd compare` tests differences with them.
"""

from __future__ import annotations

import difflib
import logging
import math
import random
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from numbers import Real
from pathlib import Path
from typing import Any

from dpkd.data.hub import local_only
from dpkd.errors import DpkdError, SettingsError, described
from dpkd.evaluation.evaluator import Evaluator
from dpkd.evaluation.predictions import Prediction, write_predictions
from dpkd.evaluation.results import Evaluation, Metric, check_finite, write_scores
from dpkd.io import digest
from dpkd.locks import folder_lock

SEED = 1234  # lm-eval's own, of few-shot examples and of sampling, where a task samples
FOLDER = "lm-eval-"  # what the name of a task is filed under begins with: no set of rows is called so
LoadedTask = Mapping[str, Any]  # lm-eval's TaskDict: `tasks` and `groups` by name


@dataclass(frozen=True)
class TaskSettings:
    """How tasks are put to a model.

    num_fewshot  examples before each question; None: as the task says
    limit        only the first rows of each task; None: all
    template     `chat`, or `auto` with a tokenizer that has one: prompts are written in the chat template
    batch_size   requests that are run together
    """

    num_fewshot: int | None = None
    limit: int | None = None
    template: str = "auto"
    batch_size: int = 32

    def chat(self, tokenizer: Any) -> bool:
        """Whether prompts are written in the tokenizer's chat template."""
        has_one = getattr(tokenizer, "chat_template", None) is not None
        return self.template == "chat" or (self.template == "auto" and has_one)


def load_tasks(names: Sequence[str], include: Path | None = None) -> dict[str, LoadedTask]:
    """Tasks, groups or tags of lm-eval by name, with their data; `include` is a folder of further tasks (YAML).

    Raises DpkdError when lm-eval is not installed, or the data of a task cannot be had, and SettingsError for names
    that no task has.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise DpkdError(f"--tasks needs the package lm-eval ({error}): pip install 'dpkd[tasks]'") from error
    folders = None if include is None else [str(include)]
    with _quiet():
        # The index of all tasks takes seconds, and tasks of one's own may do without it.
        manager = TaskManager(include_path=folders, include_defaults=False) if folders else None
        if manager is None or not set(names) <= set(manager.all_tasks):
            manager = TaskManager(include_path=folders)
        known = list(manager.all_tasks)
        if problems := [_unknown(name, known) for name in names if name not in known]:
            raise SettingsError(problems)
        with local_only():
            return {name: _loaded(manager, name) for name in names}


def score_task(
    evaluator: Evaluator, name: str, loaded: LoadedTask, settings: TaskSettings, output: Path
) -> list[tuple[Evaluation, Path]]:
    """Score a model on a task, or on those of a tag, and write each result into a folder of its own in `output`.

    A group with a score of its own is one result. Raises DpkdError when lm-eval fails.
    """
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    chat = settings.chat(evaluator.tokenizer)
    _prepare(loaded, settings.num_fewshot)
    try:
        with _quiet():
            model = HFLM(evaluator.model, tokenizer=evaluator.tokenizer, batch_size=settings.batch_size)
            found: Any = evaluate(
                model, loaded, limit=settings.limit, apply_chat_template=chat, fewshot_as_multiturn=chat
            )
    except Exception as error:  # tasks run code of their own
        raise DpkdError(f"lm-eval failed on the task {name}: {described(error)}") from error
    own = found["results"] | found.get("groups", {})
    reported = [name] if _values(own.get(name, {})) else list(loaded["tasks"])
    results = []
    for task in reported:
        parts = list(loaded["tasks"]) if task == name else [task]
        rows = _rows({part: found["samples"][part] for part in parts}, _values(own[task]))
        facts = {
            "set": filed_as(task),
            "greedy": not any(_samples(loaded["tasks"][part]) for part in parts),
            "model": evaluator.names[0],
            "teacher": None,
            "generation": {
                "num_fewshot": {part: found["n-shot"].get(part) for part in parts},
                "chat_template": chat,
                "limit": settings.limit,
                "dtype": evaluator.dtype,
            },
            "data": {"fingerprint": _fingerprint(found["samples"], parts), "rows_read": len(rows), "skipped": {}},
            "task": {
                "name": task,
                "lm_eval": version("lm_eval"),
                "versions": {p: found["versions"].get(p) for p in parts},
            },
            "stderr": _values(own[task], stderr=True),
            "dpkd": version("dpkd"),
        }
        metrics = _metrics(own[task], found["higher_is_better"].get(task, {}))
        check_finite(metrics)
        evaluation = Evaluation(len(rows), (SEED,), metrics, facts=facts)
        folder = output / filed_as(task)
        with folder_lock(folder):
            write_predictions(folder / f"predictions-{SEED}.jsonl", rows)
            write_scores(evaluation, folder)
        results.append((evaluation, folder))
    return results


def filed_as(task: str) -> str:
    """The name of a task's folder, and of its set in tables.

    >>> filed_as("gsm8k"), filed_as("my/task v2")
    ('lm-eval-gsm8k', 'lm-eval-my-task-v2')
    """
    return FOLDER + re.sub(r"[^\w.-]+", "-", task)


def metric_name(key: str) -> str:
    """lm-eval's `METRIC,FILTER` as the name of a metric; the filter `none` says nothing.

    >>> metric_name("acc,none"), metric_name("exact_match,strict-match")
    ('acc', 'exact_match_strict_match')
    """
    return re.sub(r"\W+", "_", key.removesuffix(",none")).lower()


def _unknown(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else "`lm-eval ls tasks` lists them"
    return f"--tasks: lm-eval has no task {name!r}; {hint} Tasks of your own: --include-path FOLDER"


def _loaded(manager: Any, name: str) -> LoadedTask:
    try:
        loaded: LoadedTask = manager.load([name])
    except Exception as error:
        advice = ""
        if isinstance(error, ConnectionError):
            advice = ". A task needs the network until its data are in the cache ($HF_HOME)"
        if isinstance(error, ImportError):
            advice = ". Some tasks need packages of their own: pip install 'lm-eval[NAME]'"
        raise DpkdError(f"the task {name} cannot be loaded: {described(error)}{advice}") from error
    return loaded


def _prepare(loaded: LoadedTask, num_fewshot: int | None) -> None:
    """Few-shot examples and seeds as lm-eval's own command has them; a task that says 0 examples keeps them."""
    import numpy as np
    import torch

    random.seed(0)
    np.random.seed(SEED)
    torch.manual_seed(SEED)
    for task in loaded["tasks"].values():
        own = task.get_config("num_fewshot")
        if own != 0 and (num_fewshot is not None or own is None):
            task.set_config(key="num_fewshot", value=num_fewshot or 0)
        task.set_fewshot_seed(seed=SEED)


@contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval's advice to its own users is left out, for the time of the block."""
    log = logging.getLogger("lm_eval")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


def _samples(task: Any) -> bool:
    return bool((task.get_config("generation_kwargs") or {}).get("do_sample"))


def _values(entry: Mapping[str, Any], *, stderr: bool = False) -> dict[str, float]:
    """The metrics of a task by lm-eval's keys, or their standard errors over rows."""
    found = {}
    for key, value in entry.items():
        metric, comma, rule = key.partition(",")
        if comma and metric.endswith("_stderr") is stderr and isinstance(value, Real):
            found[f"{metric.removesuffix('_stderr')},{rule}"] = float(value)
    return {metric_name(key): value for key, value in found.items()} if stderr else found


def _metrics(entry: Mapping[str, Any], higher: Mapping[str, bool | None]) -> dict[str, Metric]:
    better = {True: "higher", False: "lower", None: ""}
    metrics = {}
    for key, value in _values(entry).items():
        metric, _, rule = key.partition(",")
        title = metric if rule == "none" else f"{metric} ({rule})"
        metrics[metric_name(key)] = Metric((value,), better=better[higher.get(metric)], title=title)
    return metrics


def _rows(samples: Mapping[str, Sequence[Mapping[str, Any]]], values: Mapping[str, float]) -> list[Prediction]:
    """A row for each question, with its scores by those metrics that are their mean."""
    first: dict[str, Mapping[str, Any]] = {}
    scores: dict[str, dict[str, float]] = {}
    for task, own in samples.items():
        for sample in own:  # one for each question and filter
            row = str(sample["doc_id"]) if len(samples) == 1 else f"{task}/{sample['doc_id']}"
            first.setdefault(row, sample)
            for metric in sample["metrics"]:
                if isinstance(sample[metric], Real):
                    scores.setdefault(f"{metric},{sample['filter']}", {})[row] = float(sample[metric])
    means = {
        key: own
        for key, own in scores.items()
        if key in values and math.isclose(statistics.fmean(own.values()), values[key], rel_tol=1e-6, abs_tol=1e-9)
    }
    return [
        Prediction(
            _prediction(sample),
            row,
            str(sample["arguments"][0][0]),
            (str(sample["target"]),),
            SEED,
            {"scores": {metric_name(key): own[row] for key, own in means.items() if row in own}},
        )
        for row, sample in first.items()
    ]


def _prediction(sample: Mapping[str, Any]) -> str:
    """What the model generated, or the likeliest of several continuations."""
    given = sample["filtered_resps"]
    if given and all(isinstance(one, tuple | list) and len(one) == 2 for one in given):
        likeliest = max(range(len(given)), key=lambda i: given[i][0])
        return str(sample["arguments"][likeliest][1])
    return given[0] if given and isinstance(given[0], str) else ""


def _fingerprint(samples: Mapping[str, Sequence[Mapping[str, Any]]], parts: Sequence[str]) -> str:
    """Of questions, prompts and targets."""
    return digest([[s["doc_hash"], s["prompt_hash"], s["target_hash"]] for part in parts for s in samples[part]])
