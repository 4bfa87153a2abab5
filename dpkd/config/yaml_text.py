"""YAML as settings need it: no surprises in reading, one value a line in writing."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from dpkd.errors import DpkdError


class YamlError(ValueError):
    """What is wrong with a text, as the end of a sentence, and the line where (from 1)."""

    def __init__(self, what: str, line: int) -> None:
        super().__init__(what)
        self.what, self.line = what, line


class _Loader(yaml.SafeLoader):
    """YAML 1.2's plain values. PyYAML's own: `off` is false, `5e-4` is text, `2024-01-01` is a date."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  (PyYAML keeps its rules on the class)


_PLAIN = {
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?[0-9]+", "-+0123456789"),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+0123456789.",
    ),
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
}
for _tag, (_pattern, _first) in _PLAIN.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first))


def _float(loader: _Loader, node: yaml.ScalarNode) -> float:
    return float(node.value.lower().replace(".inf", "inf").replace(".nan", "nan"))


def _int(loader: _Loader, node: yaml.ScalarNode) -> int:
    return int(node.value)


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[str, Any]:
    """A mapping with text keys, each once: PyYAML itself would keep the last of two and say nothing."""
    values: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            raise YamlError(f"the key {key!r} is not text", key_node.start_mark.line + 1)
        if key in values:
            raise YamlError(f"duplicate key {key!r}", key_node.start_mark.line + 1)
        values[key] = loader.construct_object(value_node, deep=True)
    return values


_Loader.add_constructor("tag:yaml.org,2002:float", _float)
_Loader.add_constructor("tag:yaml.org,2002:int", _int)
_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def parse(text: str) -> Any:
    """The value of a YAML text, made of dicts, lists, text, numbers, booleans and None.

    Raises YamlError.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise YamlError(error.problem or str(error), mark.line + 1 if mark else 1) from error
    except yaml.YAMLError as error:  # a character that YAML does not allow
        raise YamlError(" ".join(str(error).split()), 1) from error


def dump_value(value: Any) -> str:
    """A value in one line of YAML, read back by `parse` as the same.

    >>> dump_value(5e-4), dump_value(None), dump_value("off"), dump_value([1, "a b"])
    ('0.0005', 'null', "'off'", '[1, a b]')
    """
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{dump_value(key)}: {dump_value(entry)}" for key, entry in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(dump_value, value)) + "]"
    text = _scalar(value)
    return _scalar(value, '"') if isinstance(value, str) and not _is_read_as(text, value) else text


def _scalar(value: Any, style: str | None = None) -> str:
    text = yaml.safe_dump(value, default_style=style, width=float("inf"), allow_unicode=True)
    return str(text).removesuffix("\n").removesuffix("\n...")


def _is_read_as(text: str, value: str) -> bool:
    """Whether a text is one line and means the same alone and inside a list."""
    try:
        return "\n" not in text and parse(text) == value and parse(f"[{text}]") == [value]
    except YamlError:
        return False


LONGEST_RESOLVED = 1_000_000  # characters


def read_resolved(path: Path) -> dict[str, Any]:
    """The settings that a run folder keeps: nested blocks by name.

    Raises DpkdError when the file is damaged, or holds what dpkd never writes there: aliases could be a bomb.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if len(text) > LONGEST_RESOLVED or any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text)):
            raise DpkdError(f"{path}: damaged: longer than any settings, or with YAML aliases, which dpkd never writes")
        values = parse(text)
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise DpkdError(f"{path}: damaged: expected YAML ({' '.join(str(error).split())[:200]})") from error
    blocks = ("loss", "teacher", "student", "data")
    if not isinstance(values, dict) or any(not isinstance(values.get(name) or {}, dict) for name in blocks):
        raise DpkdError(f"{path}: damaged: expected the blocks {', '.join(blocks)}, each with settings")
    return values
