"""What pydantic finds, in sentences: path, what was expected, what was found, from which layer, the right name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from dpkd.config.layers import Merged
from dpkd.errors import SettingsError

ModelT = TypeVar("ModelT", bound=BaseModel)
MOST = 50  # mistakes that are shown at once
LONGEST_NAME = 100  # a longer name is no slip of the finger: the search for the right one would take long


def all_paths(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Dotted paths of all settings of a model."""
    paths = []
    for name, field in model.model_fields.items():
        paths.append(f"{prefix}{name}")
        block = _block_of(field.annotation)
        if block is not None:
            paths += all_paths(block, f"{prefix}{name}.")
    return paths


def _block_of(annotation: Any) -> type[BaseModel] | None:
    for option in (annotation, *getattr(annotation, "__args__", ())):
        if isinstance(option, type) and issubclass(option, BaseModel):
            return option
    return None


def sentences(error: ValidationError, merged: Merged, known: Iterable[str], prefix: str = "") -> list[str]:
    """One sentence per setting that is wrong, in the order of the settings."""
    by_path: dict[str, list[Mapping[str, Any]]] = {}
    for problem in error.errors():
        by_path.setdefault((prefix + _path(problem["loc"], error, merged, prefix)).rstrip("."), []).append(problem)
    names = list(known)
    found = [_sentence(path, problems, merged, names) for path, problems in islice(by_path.items(), MOST)]
    return [*found, f"... and {len(by_path) - MOST:,} more mistakes"] if len(by_path) > MOST else found


def _path(location: tuple[int | str, ...], error: ValidationError, merged: Merged, prefix: str) -> str:
    """The dotted path of a location, without the names of union members that pydantic puts in."""
    values: Any = merged.values.get(prefix.rstrip("."), {}) if prefix else merged.values
    parts: list[str] = []
    for part in location:
        if isinstance(values, Mapping) and part in values:
            values = values[part]
        elif isinstance(values, list) and isinstance(part, int) and part < len(values):
            values = values[part]
        elif parts:
            break  # a union member, or a missing key of a block that is given
        parts.append(str(part))
    return ".".join(parts)


def _sentence(path: str, problems: list[Mapping[str, Any]], merged: Merged, known: list[str]) -> str:
    layer, path = merged.layer_of(path), _cut(path)
    source = f", from {layer}" if layer else ""
    first = problems[0]
    kind = first["type"]
    if kind == "extra_forbidden":
        near = _nearest(path, known)
        hint = f"; did you mean {near}?" if near else _those_beside(path, known)
        return f"{path}: no such setting{f' (from {layer})' if layer else ''}{hint}"
    if kind == "missing":
        block, name = f"{path}.{first['loc'][-1]}" if not path.endswith(str(first["loc"][-1])) else path, None
        return f"{block}: is missing{name or ''}{f' (the block is from {layer})' if layer else ''}"
    if kind == "value_error":
        return f"{path or 'settings'}: {first['ctx']['error']}{f' (from {layer})' if layer else ''}"
    expected = " or ".join(dict.fromkeys(_expected(p) for p in problems))
    return f"{path}: should be {expected} (got {_shown(first['input'])}{source})"


def _expected(problem: Mapping[str, Any]) -> str:
    message = problem["msg"]
    kind, context = problem["type"], problem.get("ctx", {})
    plain = {
        "float_parsing": "a number",
        "float_type": "a number",
        "finite_number": "a finite number",
        "int_parsing": "a whole number",
        "int_type": "a whole number",
        "int_from_float": "a whole number",
        "bool_parsing": "true or false",
        "bool_type": "true or false",
        "string_type": "a text",
        "list_type": "a list",
        "tuple_type": "a list",
        "dict_type": "a block of settings",
        "model_type": "a block of settings",
    }
    if kind in plain:
        return plain[kind]
    if kind in ("literal_error", "enum"):
        return f"one of {context['expected'].replace(' or ', ', ')}"
    return str(message.removeprefix("Input should be ").removeprefix("Value error, "))


def _cut(path: str) -> str:
    return path if len(path) <= 2 * LONGEST_NAME else f"{path[: 2 * LONGEST_NAME - 3]}..."


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python does not write numbers of thousands of digits
        text = "a huge number"
    return text if len(text) <= 60 else f"{text[:57]}..."


def _nearest(path: str, known: list[str]) -> str | None:
    """The right path nearest to a wrong one: of the same last part, in the same block, then anywhere."""
    if len(path) > LONGEST_NAME:
        return None
    block, _, key = path.rpartition(".")
    # Of one name in several blocks, that of training is meant; `batch.size` may be `train.batch_size`.
    exact = [p for p in known if p.rpartition(".")[2] in (key, path.replace(".", "_"))]
    if exact:
        return min(exact, key=lambda p: not p.startswith("train."))
    here = {p.rpartition(".")[2]: p for p in known if p.rpartition(".")[0] == block}
    near = difflib.get_close_matches(key, here, n=1, cutoff=0.6)
    if near:
        return here[near[0]]
    if _NEAR.get(key) in known:
        return _NEAR[key]
    if block == "loss":
        return None  # a setting of another loss: what sounds like it elsewhere is something else
    anywhere = {p.rpartition(".")[2]: p for p in known}
    near = difflib.get_close_matches(key, anywhere, n=1, cutoff=0.75) or difflib.get_close_matches(
        path, known, n=1, cutoff=0.75
    )
    return anywhere.get(near[0], near[0]) if near else None


def _those_beside(path: str, known: list[str]) -> str:
    """What a block has, where nothing in it is near."""
    block = path.rpartition(".")[0]
    here = [p.rpartition(".")[2] for p in known if block and p.rpartition(".")[0] == block and p != "loss.name"]
    if block == "loss":
        return f"; this loss has {', '.join(here) or 'no settings'}"
    return f"; {block} has {', '.join(here)}" if here else ""


# Names that other tools use for these settings, where the meaning is not quite the same.
_NEAR = {"samples_per_prompt": "text.num_generations", "lmbda": "text.mix", "bf16": "train.precision"}


def with_layers(problems: Iterable[str], merged: Merged) -> list[str]:
    """Sentences that begin with the path of a setting, with the layer that it came from."""
    found = []
    for problem in problems:
        layer = merged.layer_of(problem.partition(":")[0])
        got = problem.endswith(")") and "(got " in problem
        source = f"{problem[:-1]}, from {layer})" if got else f"{problem} (from {layer})"
        found.append(source if layer else problem)
    return found


def checked(model: type[ModelT], values: Mapping[str, Any], block: str) -> ModelT:
    """One block, outside a run. Raises SettingsError with its mistakes as sentences."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        merged = Merged({block: dict(values)})
        raise SettingsError(sentences(error, merged, all_paths(model, f"{block}."), f"{block}.")) from error
