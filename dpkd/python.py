"""dpkd from Python: the same runs as from the shell, and models and rows that are in memory already."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral
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

    own, files, folder = _settings(settings), _files(config), _folder(output)
    names, in_memory = _names({"teacher": teacher, "student": student}, data, tokenizer)
    registry = load_registry()
    named = {
        **_loss(loss, registry),
        **_reward(reward, registry),
        "teacher.model": names["teacher"],
        "student.model": names["student"],
        "data.path": names["data"],
        "output": None if folder is None else str(folder),
        "seed": seed,
    }
    layers = [file_layer(path) for path in files]
    layers += [flag_layer("train()", path, value) for path, value in named.items() if value is not None]
    layers += [flag_layer("settings", path, value) for path, value in own.items()]
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
    seeds: Sequence[int] | int | str | None = None,
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
    seeds           of the answers: integers, one integer, or `"10,20"`; None: the papers' five
    greedy          the likeliest token each time, under one seed
    max_new_tokens  an answer without EOS ends there, and is counted as truncated
    batch_size      answers that are drawn together
    dtype           of weights that are loaded here: float32, bfloat16, float16 or auto; an object keeps its own
    limit           read at most so many rows
    rewards         also take the implicit reward of the model's own answers
    long_prompts    a prompt beyond the limits is an error, or left out and counted (skip)
    settings        of the block `data`, with or without that word: `{"data.template": "chat"}`
    output          folder for scores and answers

    `evaluate(...)["rouge_l"]` is the mean over seeds; the result is a mapping from names of metrics to such means.

    Raises SettingsError for mistakes in the settings, DpkdError when a row cannot be scored.
    """
    from dpkd.api import SamplingSettings
    from dpkd.config.problems import checked
    from dpkd.data.settings import DataSettings
    from dpkd.data.wording import PYTHON
    from dpkd.evaluation.evaluator import EvaluationSettings, Evaluator
    from dpkd.evaluation.sets import find_set
    from dpkd.evaluation.target import find_target

    drawn, folder, own = _seeds(seeds), _folder(output), _settings(settings)
    names, in_memory = _names({"model": getattr(model, "path", model), "teacher": teacher}, data, tokenizer)
    one, target = find_set(str(names["data"])), find_target(str(names["model"]), names["teacher"])
    own = {path.removeprefix("data."): value for path, value in own.items()}
    rows = checked(DataSettings, one.given(target.data, {"limit": limit, **own}), "data")
    sampling = SamplingSettings(
        temperature=0.0 if greedy else 1.0, max_new_tokens=max_new_tokens, batch_size=batch_size
    )
    how = EvaluationSettings(sampling, drawn, rewards, long_prompts=long_prompts, wording=PYTHON)
    with in_memory.left_alone():
        evaluator = Evaluator(target.model, target.teacher, dtype=dtype, in_memory=in_memory)
        return evaluator.evaluate(one.name, rows, how, output=folder)


def _seeds(seeds: Any) -> tuple[int, ...]:
    """The seeds of an evaluation. Raises SettingsError for what is none: `[]` asks for no answers at all."""
    from dpkd.errors import SettingsError
    from dpkd.evaluation.evaluator import PAPER_SEEDS, parse_seeds

    if seeds is None:
        return PAPER_SEEDS
    listed = isinstance(seeds, Iterable) and not isinstance(seeds, str | bytes | Mapping)
    several = tuple(seeds) if listed else (seeds,)
    whole = all(isinstance(seed, Integral) and not isinstance(seed, bool) for seed in several)
    try:
        if isinstance(seeds, str) or whole:
            return parse_seeds(seeds if isinstance(seeds, str) else ",".join(map(str, several)))
    except SettingsError:
        pass
    raise SettingsError(
        [
            f"seeds: expected distinct integers, 0 or more, such as [10, 20] or '10,20', but got {_shown(seeds)}; "
            "leave it out for the papers' five"
        ]
    )


def _settings(settings: Any) -> Mapping[str, Any]:
    """Dotted paths and their values. Raises SettingsError for what is none."""
    from dpkd.errors import SettingsError

    if settings is None:
        return {}
    if isinstance(settings, Mapping) and all(isinstance(path, str) for path in settings):
        return settings
    raise SettingsError(
        [f"settings: expected dotted paths and their values, such as {{'train.lr': 1e-4}}, but got {_shown(settings)}"]
    )


def _files(config: Any) -> list[Path]:
    """Files of settings. Raises SettingsError for anything but a list of them."""
    from dpkd.errors import SettingsError

    listed = isinstance(config, Iterable) and not isinstance(config, str | bytes | Mapping)
    files: list[Any] = list(config) if listed else []
    if not listed or not all(isinstance(path, str | PathLike) for path in files):
        raise SettingsError([f"config: expected a list of YAML files, such as ['run.yaml'], but got {_shown(config)}"])
    return [Path(path) for path in files]


def _folder(output: Any) -> Path | None:
    """The folder of results. Raises SettingsError for what is no path."""
    from dpkd.errors import SettingsError

    if output is None:
        return None
    if isinstance(output, str | PathLike):
        return Path(output)
    raise SettingsError([f"output: expected a folder, such as 'runs/mine', but got {_shown(output)}"])


def _shown(value: Any) -> str:
    """A value in a message, with its type."""
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else f'{text[:60]}...'}"


def _loss(loss: Loss, registry: Registry) -> dict[str, Any]:
    """What the settings call a loss, with its settings; one of the caller's own is added to the registry."""
    if isinstance(loss, str):
        return {"loss.name": loss}
    from dpkd.api import LossSpec
    from dpkd.errors import DpkdError
    from dpkd.losses.base import ZooLoss
    from dpkd.losses.own import as_spec
    from dpkd.plugins import Registered

    if not isinstance(loss, LossSpec | ZooLoss) and not callable(loss):
        raise DpkdError(
            "loss: expected the name of a loss (`dpkd list-losses` shows them), a LossSpec, a loss of dpkd.losses.get "
            f"or a function, but got {_shown(loss)}"
        )
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
    from dpkd.errors import DpkdError
    from dpkd.plugins import Registered

    if not callable(reward):
        raise DpkdError(
            "reward: expected the name of a metric, or a function from dpkd.api.Answers to a number for each response, "
            f"but got {_shown(reward)}"
        )
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
