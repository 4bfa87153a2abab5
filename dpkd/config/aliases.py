"""Settings that have a new path: the old one stays valid in every layer, and warns with the new one."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from dpkd.api import Family, LossSpec
from dpkd.config.layers import Layer, file_layer, get_path
from dpkd.config.settings import TrainSettings
from dpkd.errors import SettingsError
from dpkd.plugins import Registry

# Old path → new path. A `*` is any one part, and the same one in both.
RENAMED: dict[str, str] = {
    "text.samples_per_prompt": "text.num_generations",
    "text.inner_epochs": "text.num_iterations",
    "text.pairs.preferred": "text.chosen",
    "text.pairs.dispreferred": "text.rejected",
    "text.pairs.chosen": "text.chosen",
    "text.pairs.rejected": "text.rejected",
    **{f"text.adaptive.{name}": f"text.{name}" for name in ("share", "rise", "tolerance", "capacity", "fresh")},
}
# Old path → a setting that it stood for without a word, where the layer does not give that one.
IMPLIED: dict[str, tuple[str, str]] = {"text.pairs": ("text.source", "pairs")}
# Names that transformers, TRL and accelerate give to these settings: valid as they are, or in the block `train`.
FIELD: dict[str, str] = {
    "model_name_or_path": "student.model",
    "learning_rate": "train.lr",
    "num_train_epochs": "train.epochs",
    "max_steps": "train.steps",
    "per_device_train_batch_size": "train.micro_batch_size",
    "lr_scheduler_type": "train.schedule",
    "max_grad_norm": "train.clip",
    "report_to": "train.trackers",
    "logging_steps": "train.log_every",
    "save_steps": "train.save_every",
    "optim": "train.optimizer",
    "gradient_checkpointing": "student.gradient_checkpointing",
    "max_length": "data.max_tokens",
    "max_prompt_length": "data.max_prompt_tokens",
    "max_completion_length": "text.sampling.max_new_tokens",
    "max_new_tokens": "text.sampling.max_new_tokens",
    "temperature": "text.sampling.temperature",
    "output_dir": "output",
}
# Values of those that say "not given" or are spelt otherwise.
_NOTHING: dict[str, tuple[Any, ...]] = {"max_steps": (-1,), "max_grad_norm": (0, 0.0), "report_to": ("none", ["none"])}
_PER_DEVICE, _ACCUMULATION = "per_device_train_batch_size", "gradient_accumulation_steps"
# The responses of a loss beside the main one have settings of the same names.
EXTRA = "terms.extra.*."


class SettingRenamed(FutureWarning):
    """A setting has a new path. Shown by default: whoever wrote the old one can change it."""


def in_our_names(layers: Sequence[Layer], processes: int | None = None) -> list[Layer]:
    """The layers with the settings that go by the field's names under dpkd's; without a warning, they are not old.

    `train.batch_size` counts over the accumulation and over all processes: it is the product of
    `per_device_train_batch_size`, `gradient_accumulation_steps` and the `processes` (None: those that
    `accelerate launch` or `torchrun` started), where any layer gives one of the first two. Raises SettingsError where
    a layer gives a setting under both names, or the product and `train.batch_size` are both given.
    """
    found: list[Layer] = []
    sizes: dict[str, int] = {}
    last, problems = -1, []
    for layer in layers:
        values = deepcopy(dict(layer.values))
        for name in (*FIELD, _ACCUMULATION):
            for path in (name, f"train.{name}"):
                if get_path(values, path) is None:
                    continue
                value = _pop(values, path)
                if name in (_PER_DEVICE, _ACCUMULATION):
                    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                        problems.append(f"{path}: should be a whole number from 1 (got {value!r}, from {layer.name})")
                        continue
                    sizes[name], last = value, len(found)
                if name not in FIELD:
                    continue
                if get_path(values, FIELD[name]) is not None:
                    problems.append(f"{path}: is the same as {FIELD[name]}, and both are given (from {layer.name})")
                elif value not in _NOTHING.get(name, ()):
                    _put(values, FIELD[name], _own_value(name, value))
        found.append(Layer(layer.name, values))
    if sizes and not problems:
        given = next((layer for layer in found if get_path(layer.values, "train.batch_size") is not None), None)
        if given is not None:
            names = " and ".join(sizes)
            problems.append(f"train.batch_size: is what {names} make, and both are given (from {given.name})")
        else:
            world = processes or int(os.environ.get("WORLD_SIZE", "1"))
            per_device = sizes.get(_PER_DEVICE, TrainSettings().micro_batch_size)
            values = dict(found[last].values)
            _put(values, "train.batch_size", per_device * sizes.get(_ACCUMULATION, 1) * world)
            found[last] = Layer(found[last].name, values)
    if problems:
        raise SettingsError(problems)
    return found


def _own_value(name: str, value: Any) -> Any:
    """A value of the field's as dpkd writes it."""
    if name == "report_to":
        return [value] if isinstance(value, str) else value
    return "adamw" if name == "optim" and value in ("adamw_torch", "adamw_torch_fused") else value


def renamed(layer: Layer, *, quiet: bool = False) -> Layer:
    """The layer under the new paths, with a warning for each old one (unless quiet).

    Raises SettingsError where it gives both an old path and its new one.
    """
    values = deepcopy(dict(layer.values))
    problems: list[str] = []
    for old, (setting, value) in _everywhere(IMPLIED):
        for path, parts in _matches(values, old):
            block = get_path(values, path)
            target = _filled(setting, parts)
            if isinstance(block, Mapping) and block and get_path(values, target) is None:
                _put(values, target, value)
    for old, new in _everywhere(RENAMED):
        for path, parts in list(_matches(values, old)):
            target = _filled(new, parts)
            if get_path(values, target) is not None:
                problems.append(f"{path}: is the old name of {target}, and both are given (from {layer.name})")
                continue
            _put(values, target, _pop(values, path))
            if not quiet:
                warnings.warn(f"{path} is now called {target} (from {layer.name})", SettingRenamed, stacklevel=2)
    if problems:
        raise SettingsError(problems)
    return Layer(layer.name, values)


def written_layers(path: Path, registry: Registry) -> list[Layer]:
    """The settings that a run wrote down, to go on with it. Versions before 0.2 wrote those of all sources.

    What names the source is a layer above the rest, so that settings of other sources are dropped.
    """
    layer = file_layer(path)
    values = deepcopy(dict(layer.values))
    for extra in (get_path(values, "terms.extra") or {}).values():
        text = extra.get("text") or {}
        if "pairs" in text:
            pair = registry.get(LossSpec, extra["loss"]).spec.family is Family.PAIR
            for name in ("source", "mix", "each", "adaptive") if pair else ("pairs",):
                text.pop(name, None)
    values = dict(renamed(Layer(layer.name, values), quiet=True).values)
    source = get_path(values, "text.source")
    above = [] if source is None else [Layer(f"text.source of {layer.name}", {"text": {"source": source}})]
    return [Layer(layer.name, values), *above]


def _everywhere(table: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The rows of a table, and those of `text` again for the losses beside the main one."""
    for old, new in table.items():
        yield old, new
        if old.startswith("text."):
            setting, *value = (new,) if isinstance(new, str) else new
            yield EXTRA + old, EXTRA + setting if not value else (EXTRA + setting, *value)


def _matches(values: Any, pattern: str, path: str = "") -> Iterator[tuple[str, tuple[str, ...]]]:
    """The paths that a pattern stands for, each with what its `*` are."""
    first, _, rest = pattern.partition(".")
    if not isinstance(values, Mapping):
        return
    for key in list(values) if first == "*" else [key for key in (first,) if key in values]:
        own, here = ((key,) if first == "*" else ()), f"{path}{key}"
        if not rest:
            yield here, own
        else:
            for found, parts in _matches(values[key], rest, f"{here}."):
                yield found, (*own, *parts)


def _filled(pattern: str, parts: tuple[str, ...]) -> str:
    for part in parts:
        pattern = pattern.replace("*", part, 1)
    return pattern


def _put(values: dict[str, Any], path: str, value: Any) -> None:
    *blocks, last = path.split(".")
    for block in blocks:
        values = values.setdefault(block, {})
    values[last] = value


def _pop(values: dict[str, Any], path: str) -> Any:
    """Take a value out, with the blocks that are empty without it."""
    block, _, last = path.rpartition(".")
    parent = get_path(values, block) if block else values
    value = parent.pop(last)
    if not parent and block:
        _pop(values, block)
    return value
