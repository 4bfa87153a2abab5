"""Settings that have a new path: the old one stays valid in every layer, and warns with the new one."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from dpkd.api import Family, LossSpec
from dpkd.config.layers import Layer, file_layer, get_path
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
# The responses of a loss beside the main one have settings of the same names.
EXTRA = "terms.extra.*."


class SettingRenamed(FutureWarning):
    """A setting has a new path. Shown by default: whoever wrote the old one can change it."""


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
