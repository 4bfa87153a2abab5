"""Layers of settings: defaults < the loss's suggestions < files in order < flags and --set.

A layer is a nested mapping with a name that messages can show. Later layers win, leaf by leaf; a layer that
changes a block's `name` replaces the block.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpkd.config.yaml_text import DEEPEST, YamlError, parse, read_limited
from dpkd.errors import SettingsError

# A text in place of one of these blocks is shorthand for one of its settings.
SHORTHANDS = {"loss": "name", "teacher": "model", "student": "model", "data": "path"}
# Blocks whose other settings belong to their name.
NAMED = {"loss"}
# Mappings that are one value: probabilities that sum to 1 make no sense merged.
WHOLE = {"text.mix"}
# Settings that mean something only beside some values of another one. A layer that gives the other one a
# different value drops them from the layers below. (`dpkd.config.text` does it for the settings of a source.)
DEPENDENTS: dict[str, dict[str, tuple[str, ...]]] = {
    "text.refresh": {"text.every": ("every_n_steps",), "text.num_iterations": ("every_step", "every_n_steps")},
    "student.init": {"student.layers": ("layers", "random")},
}


@dataclass(frozen=True)
class Layer:
    """Settings from one place; `name` says which (a file, a flag, `kd's suggestions`)."""

    name: str
    values: Mapping[str, Any]


@dataclass
class Merged:
    """All layers in one mapping, and for each dotted path the layer that it came from."""

    values: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, str] = field(default_factory=dict)

    def layer_of(self, path: str) -> str | None:
        """The layers of a path: its own, those of the settings below it, or that of a value above it.

        None when all of it is default.
        """
        below = [name for key, name in self.provenance.items() if f"{key}.".startswith(f"{path}.")]
        if below:
            return " and ".join(dict.fromkeys(below))
        while path and path not in self.provenance:
            path = path.rpartition(".")[0]
        return self.provenance.get(path)


def file_layer(path: Path, flag: str = "--config ") -> Layer:
    """Settings of a YAML file. Raises SettingsError when it cannot be read or is no mapping.

    `flag` is what the user gave it with; empty: it is an argument.
    """
    try:
        values = parse(read_limited(path))
    except FileNotFoundError as error:
        near = [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        hint = f"; {path.parent} has {', '.join(sorted(near))}" if near else ""
        raise SettingsError([f"{flag}{path}: there is no such file{hint}"]) from error
    except YamlError as error:
        raise SettingsError([f"{path}:{error.line}: {error}"]) from error
    except (OSError, ValueError) as error:  # also a name that no file can have
        raise SettingsError([f"{flag}{_short(str(path))}: cannot be read ({_short(str(error))})"]) from error
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise SettingsError(
            [f"{path}: expected blocks of settings (`loss:`, `train:`, ...), found {type(values).__name__}"]
        )
    return Layer(str(path), values)


def set_layer(assignments: Iterable[str], unread: list[str] | None = None) -> list[Layer]:
    """Layers of `--set path=value`, with values in YAML.

    What is not of that form is added to `unread` as sentences, for `resolve` to report with all other mistakes;
    without `unread` it raises SettingsError.
    """
    layers, problems = [], list[str]()
    for text in assignments:
        path, equals, value = text.partition("=")
        keys = path.strip().split(".")
        if not equals or not all(keys) or len(keys) > DEEPEST:
            problems.append(f"--set {_short(text)}: expected path=value, such as --set train.lr=1e-4")
            continue
        try:
            parsed = parse(value)
        except YamlError:
            problems.append(
                f"--set {_short(text)}: the value is not YAML; quote it, as in --set '{_short(path)}=\"...\"'"
            )
            continue
        layers.append(Layer("--set", _nest(keys, parsed)))
    if problems and unread is None:
        raise SettingsError(problems)
    if unread is not None:
        unread += problems
    return layers


def _short(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:197]}..."


def flag_layer(flag: str, path: str, value: Any) -> Layer:
    """The layer of one flag."""
    return Layer(flag, _nest(path.split("."), value))


def user_layers(
    files: Iterable[Path],
    flags: Mapping[str, tuple[str, Any]],
    assignments: Iterable[str],
    unread: list[str] | None = None,
) -> list[Layer]:
    """What the user gives, in order: files, flags (flag → path and value; None: not given), --set.

    Raises SettingsError with everything that cannot be read; with `unread` only where it is a file (what stands in
    it decides what else is wrong), and else as `set_layer`.
    """
    layers: list[Layer] = []
    problems: list[str] = []
    no_assignments = list[str]()
    for path in files:
        try:
            layers.append(file_layer(path))
        except SettingsError as error:
            problems += error.problems
    layers += [flag_layer(flag, path, value) for flag, (path, value) in flags.items() if value is not None]
    layers += set_layer(assignments, no_assignments)
    if problems or (no_assignments and unread is None):
        raise SettingsError([*problems, *no_assignments])
    if unread is not None:
        unread += no_assignments
    return layers


def suggestion_layer(loss: str, suggests: Mapping[str, Any]) -> Layer:
    """What a loss suggests for the run."""
    return Layer(f"{loss}'s suggestions", suggests)


def merge(layers: Iterable[Layer]) -> Merged:
    """Merge layers, the later over the earlier."""
    merged = Merged()
    for layer in layers:
        values = {key: _expanded(key, value) for key, value in layer.values.items() if not _is_empty(key, value)}
        for path in _outdated(merged.values, values):
            if merged.layer_of(path) != layer.name:  # two --set that contradict each other are a mistake
                drop(merged, path)
        for block in NAMED & values.keys():
            new, old = values[block], merged.values.get(block)
            names = [values["name"] for values in (old, new) if isinstance(values, dict) and "name" in values]
            if len(names) == 2 and names[0] != names[1]:
                drop(merged, block)
        _merge_into(merged.values, values, "", layer.name, merged.provenance)
    return merged


def _expanded(key: str, value: Any) -> Any:
    return {SHORTHANDS[key]: value} if key in SHORTHANDS and isinstance(value, str) else value


def _nest(keys: list[str], value: Any) -> dict[str, Any]:
    for key in reversed(keys):
        value = {key: value}
    return value  # type: ignore[no-any-return]


def _is_empty(key: str, value: Any) -> bool:
    """A block with nothing under its heading: all its lines are comments."""
    return value is None and key != "output"


def _outdated(below: Mapping[str, Any], above: Mapping[str, Any]) -> list[str]:
    paths: list[str] = []
    for parent, dependents in DEPENDENTS.items():
        new = get_path(above, parent)
        if new is not None and new != get_path(below, parent):
            paths += [path for path, meaningful in dependents.items() if new not in meaningful]
    return paths


def get_path(values: Mapping[str, Any], path: str) -> Any:
    """The value of a dotted path; None where there is none."""
    value: Any = values
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def drop(merged: Merged, path: str) -> None:
    """Forget a setting and where it came from."""
    *above, last = path.split(".")
    block = get_path(merged.values, ".".join(above)) if above else merged.values
    if isinstance(block, dict):
        block.pop(last, None)
    _forget(merged.provenance, path)


def _forget(provenance: dict[str, str], path: str) -> None:
    for known in [p for p in provenance if p == path or p.startswith(f"{path}.")]:
        del provenance[known]


def _merge_into(
    target: dict[str, Any], values: Mapping[str, Any], prefix: str, layer: str, provenance: dict[str, str]
) -> None:
    for key, value in values.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            # `--set text.mix.a=... --set text.mix.b=...` are one mapping: they share the layer's name.
            replaced = path in WHOLE and any(
                name != layer for p, name in provenance.items() if p.startswith(f"{path}.")
            )
            if replaced or not isinstance(target.get(key), dict):
                if key in target:
                    _forget(provenance, path)
                target[key] = {}
            provenance.pop(path, None)
            _merge_into(target[key], value, f"{path}.", layer, provenance)
        else:
            if key in target:
                _forget(provenance, path)
            target[key] = value
            provenance[path] = layer
