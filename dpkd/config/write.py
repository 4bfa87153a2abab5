"""Settings as files: the resolved ones of a run with the source of each value, and the schema of all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from dpkd.api import SourceSpec
from dpkd.config.layers import SHORTHANDS
from dpkd.config.resolve import Resolved
from dpkd.config.settings import RunSettings
from dpkd.config.yaml_text import dump_value
from dpkd.io import write_text
from dpkd.plugins import RegisteredLoss, Registry


def annotated_yaml(resolved: Resolved) -> str:
    """All settings as YAML; each value that is no default has a comment that says where it came from.

    So has a default that is chosen later, until it is chosen.
    """
    lines = ["# A value without a comment is a default."]
    _write(resolved.as_dict(), "", 0, resolved.provenance, lines)
    return "\n".join(lines) + "\n"


def _write(values: dict[str, Any], prefix: str, depth: int, provenance: dict[str, str], lines: list[str]) -> None:
    for key, value in values.items():
        path = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            lines.append(f"{'  ' * depth}{key}:")
            _write(value, f"{path}.", depth + 1, provenance, lines)
            continue
        source = _source(path, provenance) or _LATER.get(path)
        lines.append(f"{'  ' * depth}{key}: {dump_value(value)}" + (f"  # {source}" if source else ""))


# Defaults that a run replaces by what is trained (`dpkd.train.defaults`).
_LATER = {"train.lr": "a default: a run chooses by size and adapters, see dpkd train --dry-run"}


def _source(path: str, provenance: dict[str, str]) -> str | None:
    while path:
        if path in provenance:
            return provenance[path]
        path = path.rpartition(".")[0]
    return None


def read_sources(text: str) -> dict[str, str]:
    """Where values come from, by dotted path: the comments of config.resolved.yaml, two spaces to a level."""
    found: dict[str, str] = {}
    above: list[str] = []
    for line in text.splitlines():
        key, colon, rest = line.strip().partition(":")
        if not colon:
            continue
        level = (len(line) - len(line.lstrip())) // 2
        above = [*above[:level], key]
        value, mark, source = rest.rpartition("  # ")
        if mark and _same_yaml(value, rest) and source.strip() not in _LATER.values():
            found[".".join(above)] = source.strip()
    return found


def _same_yaml(value: str, with_comment: str) -> bool:
    """Whether what follows is a comment, and no part of a quoted text."""
    try:
        return bool(yaml.safe_load(value) == yaml.safe_load(with_comment))
    except yaml.YAMLError:
        return False


def write_config(resolved: Resolved, folder: Path) -> None:
    """Write `config.resolved.yaml`: reading it back gives the same settings, without any other layer."""
    write_text(folder / "config.resolved.yaml", annotated_yaml(resolved))


def schema(registry: Registry, registered: RegisteredLoss | None = None) -> dict[str, Any]:
    """JSON schema of all settings; with a loss also of its own."""
    result = RunSettings.model_json_schema()
    texts = [source.spec.config.model_json_schema() for source in registry.all(SourceSpec).values()]
    for own in texts:
        result["$defs"] |= own.pop("$defs", {})
    result["properties"]["text"] = {"anyOf": texts}
    if registered is not None:
        own = registered.spec.config.model_json_schema()
        result["$defs"] |= own.pop("$defs", {})  # references start at the root
        own.setdefault("properties", {})["name"] = {"const": registered.spec.name, "type": "string"}
        result["properties"]["loss"] = own
    for block in SHORTHANDS.keys() & result["properties"].keys():
        result["properties"][block] = {"anyOf": [{"type": "string"}, result["properties"][block]]}
    return result
