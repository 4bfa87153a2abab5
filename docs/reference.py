"""Reference pages from the code: the command line, the settings of a run, the public Python API. Markdown."""

from __future__ import annotations

import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator, Mapping, Set
from enum import EnumType
from types import ModuleType
from typing import Any

from cards import escaped, table

from dpkd.cli.describe import range_text, value_text

MODULES = ("dpkd", "dpkd.api", "dpkd.losses", "dpkd.integrations", "dpkd.functional", "dpkd.testing", "dpkd.errors")
EXAMPLE = re.compile(r"(?:^>>> .*\n(?:(?!\n|>>> ).*\n?)*)+", flags=re.MULTILINE)

ALIGNED = re.compile(r"^(\w+)  +(\S.*)$", flags=re.MULTILINE)  # the fields of a class, in a column


def pages() -> dict[str, str]:
    """Page → its text."""
    made = {"cli": command_line(), "settings": settings(), "api": api()}
    return {name: "\n\n".join(parts) + "\n" for name, parts in made.items()}


def command_line() -> Iterator[str]:
    """The help of every command."""
    from typer.main import get_command

    from dpkd.cli.main import app

    def helped(command: Any, words: tuple[str, ...], parent: Any) -> Iterator[str]:
        context = command.context_class(
            command, info_name=words[-1], parent=parent, terminal_width=100, max_content_width=100
        )
        yield f"## {' '.join(words)}" if parent is not None else ""
        yield f"```text\n{command.get_help(context).strip()}\n```"
        for name, sub in getattr(command, "commands", {}).items():
            yield from helped(sub, (*words, name), context)

    yield "# Command line"
    yield "What `--help` says. A mistake in flags or settings is a sentence and exit code 2; others exit with 1."
    yield from filter(None, helped(get_command(app), ("dpkd",), None))


def settings() -> Iterator[str]:
    """Every setting of a run but those of the losses, which stand on their cards."""
    from dpkd.config.settings import RunSettings

    schema = RunSettings.model_json_schema()
    yield "# Settings"
    yield (
        "Every setting of a run, for `--set PATH=VALUE` and YAML files. Layers, later ones win: defaults, what the "
        "loss suggests, `--config` files in order, flags and `--set`. `dpkd config show` prints the result with the "
        "source of each value, `dpkd config schema` this page as JSON schema. A loss's own settings (`loss.NAME`) are "
        "on its [card](../zoo.md)."
    )
    sections: dict[str, list[tuple[str, ...]]] = {}
    for path, field in _leaves(schema, schema["$defs"]):
        line = (f"`{path}`", f"`{value_text(field.get('default'))}`", escaped(range_text(field)), _meaning(field))
        sections.setdefault(path.split(".")[0] if "." in path else "", []).append(line)
    for block in sorted(sections):
        yield f"## {block or 'The run'}"
        yield table(("setting", "default", "range", "meaning"), sections[block])


def _leaves(schema: Mapping[str, Any], definitions: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, field in schema.get("properties", {}).items():
        inner = _block(field, definitions)
        if inner is None:
            yield prefix + name, field
            values = field.get("additionalProperties")
            each = _block(values, definitions) if isinstance(values, Mapping) else None
            yield from _leaves(each or {}, definitions, f"{prefix}{name}.NAME.")
            items = _block(field.get("items") or {}, definitions)  # a list of blocks: each has these
            yield from _leaves(items or {}, definitions, f"{prefix}{name}.")
            continue
        if "anyOf" in field:  # may be none
            yield prefix + name, {"type": "a block", **{k: v for k, v in field.items() if k != "anyOf"}}
        yield from _leaves(inner, definitions, f"{prefix}{name}.")


def _block(field: Mapping[str, Any], definitions: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The schema of a block of settings, where a field is one (or none)."""
    for option in (field, *field.get("anyOf", ())):
        found = definitions.get(str(option.get("$ref", "")).rpartition("/")[2])
        if found is not None and "properties" in found:
            return found  # type: ignore[no-any-return]
    return None


def _meaning(field: Mapping[str, Any]) -> str:
    return escaped(str(field.get("description", "")))


def public_names(module: ModuleType) -> list[str]:
    """What a module offers: its `__all__`, else the public classes and functions that it defines."""
    own = [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", "") == module.__name__
    ]
    return list(getattr(module, "__all__", own))


def api() -> Iterator[str]:
    """The public names of the modules that a plugin or a script imports."""
    yield "# Python"
    yield "What is public, and kept compatible. Shapes in names: N positions, V vocabulary, B pairs."
    for module_name in MODULES:
        module = importlib.import_module(module_name)
        yield f"## {module_name}"
        yield _prose(inspect.getdoc(module) or "")
        for name in public_names(module):
            value = getattr(module, name)
            if not inspect.ismodule(value) and not isinstance(value, str):
                yield from _entry(f"{module_name}.{name}", value)


def _entry(path: str, value: Any) -> Iterator[str]:
    yield f"### `{path}`"
    if not (inspect.isclass(value) or inspect.isfunction(value)):
        yield f"A `{type(value).__name__}`."
        return
    if not isinstance(value, EnumType):
        yield f"```python\n{_signature(path.rpartition('.')[2], value)}\n```"
    yield _prose(inspect.getdoc(value) or "")
    if isinstance(value, EnumType):
        yield "\n".join(f"- `{member.name}` = `{member.value!r}`" for member in value)
    elif inspect.isclass(value):
        yield from _members(value)


def _members(kind: type) -> Iterator[str]:
    for name, value in inspect.getmembers(kind):
        told, function = inspect.getdoc(value), getattr(value, "fget", value)
        if name.startswith("_") or not told or not getattr(function, "__module__", "").startswith("dpkd"):
            continue
        if inspect.isfunction(value) or inspect.ismethod(value):
            yield f"**`{_signature(name, value)}`** {_prose(told)}".replace("\n    ", "\n")
        elif isinstance(value, property):
            yield f"**`{name}`** {_prose(told)}"


class _Bare(str):
    """An annotation that prints without quotes."""

    def __repr__(self) -> str:
        return str(self)


def _signature(name: str, value: Any) -> str:
    """As it is written in the code, over several lines where it is long."""
    try:
        found = inspect.signature(value)
    except ValueError:  # an exception has none of its own
        return name
    parts: list[str] = []
    for parameter in found.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not any(part.startswith("*") for part in parts):
            parts.append("*")
        parts.append(str(_bare(parameter)))
    back = "" if found.return_annotation is found.empty else f" -> {_text(found.return_annotation)}"
    line = f"{name}({', '.join(parts)}){back}"
    if len(line) <= 100:
        return line
    inner = ",\n    ".join(parts)
    return f"{name}(\n    {inner},\n){back}"


def _bare(parameter: inspect.Parameter) -> inspect.Parameter:
    if parameter.annotation is not parameter.empty:
        parameter = parameter.replace(annotation=_Bare(_text(parameter.annotation)))
    if isinstance(parameter.default, Set):
        members = ", ".join(sorted(str(getattr(member, "name", member)) for member in parameter.default))
        parameter = parameter.replace(default=_Bare(f"{{{members}}}" if members else "frozenset()"))
    return parameter


def _text(annotation: Any) -> str:
    return annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)


def _prose(text: str) -> str:
    """A docstring as Markdown: its examples become code blocks."""
    text = textwrap.dedent(text).strip() + "\n"
    text = ALIGNED.sub(r"- `\1`: \2", text)
    return EXAMPLE.sub(lambda found: f"```python\n{found[0].strip()}\n```\n", text).strip()
