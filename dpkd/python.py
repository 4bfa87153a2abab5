"""dpkd from Python: the same runs as from the shell, and models and rows that are in memory already."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, Union

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from dpkd.evaluation.results import Evaluation
    from dpkd.models.in_memory import InMemory
    from dpkd.run_folder import RunFolder

__all__ = ["evaluate", "resume", "train"]

Model: TypeAlias = Union[str, PathLike[str], "PreTrainedModel"]
Data: TypeAlias = str | PathLike[str] | Iterable[Mapping[str, Any]]


def train(
    *,
    loss: str,
    teacher: Model | None = None,
    student: Model | None = None,
    data: Data | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    output: str | Path | None = None,
    seed: int | None = None,
    config: Sequence[str | Path] = (),
    settings: Mapping[str, Any] | None = None,
) -> RunFolder:
    """Distil, as `dpkd train` does; `settings` maps dotted paths to values. Returns the run's folder.

    `teacher` and `student` are names, paths, or causal language models of transformers; `data` is a name, a path, a
    `datasets.Dataset`, or any iterable of rows. `tokenizer` is that of the models in memory (None: of their
    `name_or_path`). The objects are left as they are: what is trained is a copy of the student, and its weights are
    in the folder `model` of the run.

    Raises SettingsError with every mistake in the settings, DpkdError for what the run stumbles over.
    """
    from dpkd.config.layers import file_layer, flag_layer
    from dpkd.config.resolve import resolve
    from dpkd.plugins import load_registry
    from dpkd.train.accelerate_state import own_accelerate_state
    from dpkd.train.run import train as run

    names, given = _names({"teacher": teacher, "student": student}, data, tokenizer)
    named = {
        "loss.name": loss,
        "teacher.model": names["teacher"],
        "student.model": names["student"],
        "data.path": names["data"],
        "output": None if output is None else str(output),
        "seed": seed,
    }
    layers = [file_layer(Path(path)) for path in config]
    layers += [flag_layer("train()", path, value) for path, value in named.items() if value is not None]
    layers += [flag_layer("settings", path, value) for path, value in (settings or {}).items()]
    resolved = resolve(layers, load_registry(), given)
    with own_accelerate_state(), given.left_alone():
        return run(resolved)


def resume(
    folder: str | Path | RunFolder,
    *,
    teacher: PreTrainedModel | None = None,
    student: PreTrainedModel | None = None,
    data: Iterable[Mapping[str, Any]] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> RunFolder:
    """Continue an interrupted run, as `dpkd train --resume` does, bit for bit.

    What was an object when the run began is given again, as it was then; what had a name is not.

    Raises DpkdError when the run is finished, when an object is missing, or when one is not what it was.
    """
    from dpkd.train.accelerate_state import own_accelerate_state
    from dpkd.train.resume import resume_folder

    _, given = _names({"teacher": teacher, "student": student}, data, tokenizer)
    path = folder if isinstance(folder, str | Path) else folder.path
    with own_accelerate_state(), given.left_alone():
        return resume_folder(Path(path), given=given)


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

    Model, teacher and data may be objects, as for `train`; `dtype` is that of weights that are loaded here, and an
    object keeps its own. `settings` maps names of the block `data` to values (`{"template": "chat"}`).
    `evaluate(...)["rouge_l"]` is the mean over seeds.

    Raises SettingsError for mistakes in the settings, DpkdError when a row cannot be scored.
    """
    from dpkd.api import SamplingSettings
    from dpkd.config.problems import checked
    from dpkd.data.settings import DataSettings
    from dpkd.evaluation.evaluator import PAPER_SEEDS, EvaluationSettings, Evaluator
    from dpkd.evaluation.sets import find_set
    from dpkd.evaluation.target import find_target

    names, given = _names({"model": getattr(model, "path", model), "teacher": teacher}, data, tokenizer)
    one, target = find_set(str(names["data"])), find_target(str(names["model"]), names["teacher"])
    rows = checked(DataSettings, one.given(target.data, {"limit": limit, **(settings or {})}), "data")
    sampling = SamplingSettings(
        temperature=0.0 if greedy else 1.0, max_new_tokens=max_new_tokens, batch_size=batch_size
    )
    how = EvaluationSettings(sampling, tuple(seeds or PAPER_SEEDS), rewards, long_prompts=long_prompts)
    with given.left_alone():
        evaluator = Evaluator(target.model, target.teacher, dtype=dtype, given=given)
        return evaluator.evaluate(one.name, rows, how, output=Path(output) if output is not None else None)


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
