"""YAML as settings need it: no surprises in reading, one value a line in writing."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from dpkd.errors import DpkdError
from dpkd.io import regular

LONGEST = 1_000_000  # characters of a file of settings
LONGEST_NUMBER = 400  # characters; a float has at most 309 digits before its point
MOST_VALUES = 20_000
DEEPEST = 50
BOM = "\ufeff"


class YamlError(ValueError):
    """What is wrong with a text, as the end of a sentence, and the line where (from 1)."""

    def __init__(self, what: str, line: int) -> None:
        super().__init__(what)
        self.what, self.line = what, line


class _Loader(yaml.SafeLoader):
    """YAML 1.2's plain values. PyYAML's own: `off` is false, `5e-4` is text, `2024-01-01` is a date."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  (PyYAML keeps its rules on the class)
    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.depth > DEEPEST:
            raise YamlError(f"is nested more than {DEEPEST} levels deep", self.line + 1)
        self.depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1


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
    if len(node.value) > LONGEST_NUMBER:
        raise YamlError(f"a number of {len(node.value):,} characters", node.start_mark.line + 1)
    return int(node.value)


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[str, Any]:
    """A mapping with text keys, each once: PyYAML itself would keep the last of two and say nothing."""
    values: dict[str, Any] = {}
    if not isinstance(node, yaml.MappingNode):  # a tag may stand before anything
        raise YamlError("expected a mapping after its tag", node.start_mark.line + 1)
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            raise YamlError(f"the key {_short(key)} is not text", key_node.start_mark.line + 1)
        if key in values:
            raise YamlError(f"duplicate key {_short(key)}", key_node.start_mark.line + 1)
        values[key] = loader.construct_object(value_node, deep=True)
    return values


_Loader.add_constructor("tag:yaml.org,2002:float", _float)
_Loader.add_constructor("tag:yaml.org,2002:int", _int)
_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def parse(text: str) -> Any:
    """The value of a YAML text, made of dicts, lists, text, numbers, booleans and None.

    Raises YamlError; also beyond the limits below, which no settings reach: a few lines of aliases can stand for
    billions of values.
    """
    if len(text) > LONGEST:
        raise YamlError(f"has {len(text):,} characters; settings may have {LONGEST:,}", 1)
    text = text.removeprefix(BOM)
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _check_size(node)
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise YamlError(_short(error.problem or str(error), str), mark.line + 1 if mark else 1) from error
    except yaml.YAMLError as error:  # a character that YAML does not allow
        raise YamlError(" ".join(str(error).split()), 1) from error
    except (ValueError, TypeError, AttributeError, LookupError) as error:  # a tag before what it does not fit
        if isinstance(error, YamlError):
            raise
        raise YamlError(f"a value does not fit its tag ({_short(str(error), str)})", 1) from error


def _check_size(root: yaml.Node) -> None:
    """Raise YamlError where there are too many values; an alias counts as all that it stands for."""
    sizes: dict[int, int] = {}  # 0: being counted

    def size(node: yaml.Node) -> int:
        known = sizes.get(id(node))
        if known == 0:
            raise YamlError("a value holds itself, by an alias", node.start_mark.line + 1)
        if known is None:
            sizes[id(node)] = 0
            children = node.value if isinstance(node, yaml.CollectionNode) else []
            pairs = isinstance(node, yaml.MappingNode)
            known = 1 + sum(size(child) for entry in children for child in (entry if pairs else (entry,)))
            if known > MOST_VALUES:
                what = f"has {known:,} keys and values, aliases written out; settings may have {MOST_VALUES:,}"
                raise YamlError(what, node.start_mark.line + 1)
            sizes[id(node)] = known
        return known

    size(root)


def _short(value: Any, shown: Callable[[Any], str] = repr) -> str:
    text = shown(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


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


def read_resolved(path: Path) -> dict[str, Any]:
    """The settings that a run folder keeps: nested blocks by name. Raises DpkdError when the file is damaged."""
    try:
        values = parse(read_limited(path))
    except (OSError, ValueError) as error:
        raise DpkdError(f"{path}: damaged: expected YAML ({' '.join(str(error).split())[:200]})") from error
    blocks = ("loss", "teacher", "student", "data")
    if not isinstance(values, dict) or any(not isinstance(values.get(name) or {}, dict) for name in blocks):
        raise DpkdError(f"{path}: damaged: expected the blocks {', '.join(blocks)}, each with settings")
    return values


def read_limited(path: Path) -> str:
    """The text of a file of settings. Raises OSError for what is no file, and YamlError beyond the limit."""
    if regular(path).stat().st_size > 4 * LONGEST:  # UTF-8 has at most four bytes a character
        raise YamlError(f"has {path.stat().st_size:,} bytes; settings may have {LONGEST:,} characters", 1)
    return path.read_text(encoding="utf-8")
