"""dpkd from Python: the same runs as from the shell, and models and rows that are in memory already."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, Union

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from dpkd.api import Answers, Callback, LossSpec
    from dpkd.evaluation.results import Evaluation
    from dpkd.losses.base import ZooLoss
    from dpkd.models.in_memory import InMemory
    from dpkd.plugins import Registry
    from dpkd.run_folder import RunFolder

__all__ = ["evaluate", "resume", "train"]

Model: TypeAlias = Union[str, PathLike[str], "PreTrainedModel"]
Loss: TypeAlias = Union[str, "LossSpec", "ZooLoss", Callable[..., "Tensor"]]
Reward: TypeAlias = str | Callable[["Answers"], Sequence[float]]
Data: TypeAlias = str | PathLike[str] | Iterable[Mapping[str, Any]]


def train(
    *,
    loss: Loss,
    teacher: Model | None = None,
    student: Model | None = None,
    data: Data | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    output: str | Path | None = None,
    seed: int | None = None,
    config: Sequence[str | Path] = (),
    settings: Mapping[str, Any] | None = None,
    reward: Reward | None = None,
    callbacks: Sequence[Callback] = (),
) -> RunFolder:
    """Distil, as `dpkd train` does. Returns the run's folder; its `model` loads with `AutoModelForCausalLM`.

    loss       the name of an installed loss; or one of your own: a `LossSpec`, a loss of `dpkd.losses.get`, or a
               function whose arguments are what it reads and, with defaults, its settings (see `dpkd.losses.get`)
    teacher    a name, a path, or a causal language model of transformers
    student    the same; an object is left as it is, and a copy of it is trained
    data       a name, a path, a `datasets.Dataset`, or any iterable of rows
    tokenizer  that of the models in memory; None: of their `name_or_path`
    output     the run's folder; None: the next free `runs/LOSS-N`
    seed       of everything random in the run
    config     YAML files, later ones over earlier ones
    settings   dotted paths and their values, over all else: `{"train.lr": 1e-4}`
    reward     for a loss that reads rewards: the name of an installed metric, or a function from `dpkd.api.Answers` to
               a number for each response
    callbacks  what to do beside training, see `dpkd.api.Callback`

    Raises SettingsError with every mistake in the settings, DpkdError for what the run stumbles over.
    """
    from dpkd.config.layers import file_layer, flag_layer
    from dpkd.config.resolve import resolve
    from dpkd.plugins import load_registry
    from dpkd.train.accelerate_state import own_accelerate_state
    from dpkd.train.run import train as run

    names, in_memory = _names({"teacher": teacher, "student": student}, data, tokenizer)
    registry = load_registry()
    named = {
        **_loss(loss, registry),
        **_reward(reward, registry),
        "teacher.model": names["teacher"],
        "student.model": names["student"],
        "data.path": names["data"],
        "output": None if output is None else str(output),
        "seed": seed,
    }
    layers = [file_layer(Path(path)) for path in config]
    layers += [flag_layer("train()", path, value) for path, value in named.items() if value is not None]
    layers += [flag_layer("settings", path, value) for path, value in (settings or {}).items()]
    resolved = resolve(layers, registry, in_memory)
    with own_accelerate_state(), in_memory.left_alone():
        return run(resolved, callbacks=callbacks)


def resume(
    folder: str | Path | RunFolder,
    *,
    loss: Loss | None = None,
    teacher: PreTrainedModel | None = None,
    student: PreTrainedModel | None = None,
    data: Iterable[Mapping[str, Any]] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    reward: Reward | None = None,
    callbacks: Sequence[Callback] = (),
) -> RunFolder:
    """Continue an interrupted run, as `dpkd train --resume` does, bit for bit.

    folder     of the run, or the run as it was returned
    loss       a loss of your own, where the run had one; it is not compared with what it was, nor is a `reward`
    teacher    a model that was an object when the run began, unchanged; `student`, `data` and `tokenizer` likewise.
               What was given by name is loaded again, and left out here
    callbacks  as in `train`

    Raises DpkdError when the run is finished, when an object is missing, or when one is not what it was.
    """
    from dpkd.plugins import load_registry
    from dpkd.train.accelerate_state import own_accelerate_state
    from dpkd.train.resume import resume_folder

    registry = load_registry()
    if loss is not None:
        _loss(loss, registry)
    _reward(reward, registry)
    _, in_memory = _names({"teacher": teacher, "student": student}, data, tokenizer)
    path = folder if isinstance(folder, str | Path) else folder.path
    with own_accelerate_state(), in_memory.left_alone():
        return resume_folder(Path(path), in_memory=in_memory, registry=registry, callbacks=callbacks)


def evaluate(
    model: Model | RunFolder,
    data: Data,
    *,
    teacher: Model | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    seeds: Sequence[int] | None = None,
    greedy: bool = False,
    max_new_tokens: int = 256,
    batch_size: int = 32,
    dtype: str = "float32",
    limit: int | None = None,
    rewards: bool = False,
    long_prompts: Literal["error", "skip"] = "error",
    settings: Mapping[str, Any] | None = None,
    output: str | Path | None = None,
) -> Evaluation:
    """Score a run, model or hub id on a set, as `dpkd eval` does; nothing is written without `output`.

    model           a run, a name, a path, or a causal language model of transformers
    data            a name, a path, a `datasets.Dataset`, or any iterable of rows; or one of the papers' sets by name
    teacher         to measure divergences from; None: that of the run
    tokenizer       of the models in memory; None: of their `name_or_path`
    seeds           of the answers; None: the papers' five
    greedy          the likeliest token each time, under one seed
    max_new_tokens  an answer without EOS ends there, and is counted as truncated
    batch_size      answers that are drawn together
    dtype           of weights that are loaded here: float32, bfloat16, float16 or auto; an object keeps its own
    limit           read at most so many rows
    rewards         also take the implicit reward of the model's own answers
    long_prompts    a prompt beyond the limits is an error, or left out and counted (skip)
    settings        of the block `data`, with or without that word: `{"data.template": "chat"}`
    output          folder for scores and answers

    `evaluate(...)["rouge_l"]` is the mean over seeds.

    Raises SettingsError for mistakes in the settings, DpkdError when a row cannot be scored.
    """
    from dpkd.api import SamplingSettings
    from dpkd.config.problems import checked
    from dpkd.data.settings import DataSettings
    from dpkd.evaluation.evaluator import PAPER_SEEDS, EvaluationSettings, Evaluator
    from dpkd.evaluation.sets import find_set
    from dpkd.evaluation.target import find_target

    names, in_memory = _names({"model": getattr(model, "path", model), "teacher": teacher}, data, tokenizer)
    one, target = find_set(str(names["data"])), find_target(str(names["model"]), names["teacher"])
    own = {path.removeprefix("data."): value for path, value in (settings or {}).items()}
    rows = checked(DataSettings, one.given(target.data, {"limit": limit, **own}), "data")
    sampling = SamplingSettings(
        temperature=0.0 if greedy else 1.0, max_new_tokens=max_new_tokens, batch_size=batch_size
    )
    how = EvaluationSettings(sampling, tuple(seeds or PAPER_SEEDS), rewards, long_prompts=long_prompts)
    with in_memory.left_alone():
        evaluator = Evaluator(target.model, target.teacher, dtype=dtype, in_memory=in_memory)
        return evaluator.evaluate(one.name, rows, how, output=Path(output) if output is not None else None)


def _loss(loss: Loss, registry: Registry) -> dict[str, Any]:
    """What the settings call a loss, with its settings; one of the caller's own is added to the registry."""
    if isinstance(loss, str):
        return {"loss.name": loss}
    from dpkd.losses.base import ZooLoss
    from dpkd.losses.own import as_spec
    from dpkd.plugins import Registered

    own: dict[str, Any] = {}
    if isinstance(loss, ZooLoss):
        own = {f"loss.{k}": v for k, v in loss.config.model_dump(mode="json", exclude_defaults=True).items()}
    spec = loss.spec if isinstance(loss, ZooLoss) else as_spec(loss)
    if not any(one.spec is spec or one.spec == spec for one in registry.losses.values()):
        registry.add(Registered(spec, "your program", "-", spec.name, spec.loss.__module__))
    return {"loss.name": spec.name, **own}


def _reward(reward: Reward | None, registry: Registry) -> dict[str, str]:
    """What the settings call a reward; a function of the caller's is added to the registry as a metric."""
    if reward is None or isinstance(reward, str):
        return {} if reward is None else {"text.reward": reward}
    from dpkd.api import MetricSpec
    from dpkd.plugins import Registered

    name = re.sub(r"\W+", "_", reward.__name__.strip("<>_")).lower()
    summary = (inspect.getdoc(reward) or "a reward function of your program").splitlines()[0]
    metric = MetricSpec(name, "", "higher", summary, per_row=reward)
    registry.add(Registered(metric, "your program", "-", name, reward.__module__))
    return {"text.reward": name}


def _names(models: Mapping[str, Any], data: Any, tokenizer: Any) -> tuple[dict[str, str | None], InMemory]:
    """What the settings call each argument, and the objects among them by those names.

    Raises DpkdError for an object that is nothing of the kind, and for a tokenizer without a model.
    """
    from dpkd.data.memory import memory_name
    from dpkd.errors import DpkdError
    from dpkd.models.in_memory import InMemory, given_model, given_rows

    names: dict[str, str | None] = {}
    objects: dict[str, Any] = {}
    for what, value in {**models, "data": data}.items():
        named = value is None or isinstance(value, str | PathLike)
        names[what] = memory_name(what) if not named else None if value is None else str(value)
        if not named:
            objects[what] = value
    rows = {memory_name("data"): given_rows(objects.pop("data"))} if "data" in objects else {}
    if tokenizer is not None and not objects:
        raise DpkdError(
            "tokenizer: belongs to a model in memory, and none was given; a model with a name brings its own "
            "(settings={'teacher.tokenizer': NAME} for another of the teacher)"
        )
    return names, InMemory(
        {memory_name(what): given_model(what, one, tokenizer) for what, one in objects.items()}, rows
    )
