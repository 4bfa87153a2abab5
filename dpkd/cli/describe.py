"""A loss's card on the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from dpkd.host import RegisteredLoss

__all__ = ["print_card"]


def print_card(loss: RegisteredLoss, row: Mapping[str, Any], console: Console | None = None) -> None:
    """Print everything that a user reads before choosing a loss."""
    console = console or Console()
    spec, card = loss.spec, loss.spec.card
    console.print(Text.assemble((spec.name, "bold"), f"  {card.title}"))
    console.print(card.summary, highlight=False)
    console.print(Padding(Text(card.formula), (1, 4)))
    facts = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    facts.add_column(style="dim", no_wrap=True)
    facts.add_column()
    for key, value in (
        ("family", spec.family.value),
        ("text by", ", ".join(row["text"])),
        ("needs of the teacher", row["needs"]),
        ("use when", card.use_when),
        ("avoid when", card.avoid_when),
        ("notes", card.notes),
        ("promises", ", ".join(sorted(spec.traits))),
        (
            "sources",
            "\n".join(f"{s.title}{f', {s.where}' if s.where else ''}\n{s.url}" for s in card.sources),
        ),
        ("suggests", "\n".join(f"{path}={value}" for path, value in _leaves(spec.suggests))),
        ("from", loss.origin),
    ):
        if value:
            facts.add_row(key, Text(value))
    console.print(facts)
    _print_settings(spec.config.model_json_schema(), console)


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _print_settings(schema: Mapping[str, Any], console: Console) -> None:
    fields = schema.get("properties", {})
    if not fields:
        console.print("\nno settings")
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title="settings (--set loss.NAME=VALUE)", title_justify="left")
    for column in ("name", "default", "range", "meaning", "default from"):
        table.add_column(column, no_wrap=column == "name")
    for name, field in fields.items():
        table.add_row(
            name,
            _value(field.get("default")),
            _range(field),
            field.get("description", ""),
            field.get("source", ""),
        )
    console.print(table)


def _value(value: Any) -> str:
    if value is None or isinstance(value, bool):  # not a dict of these: 1.0 == True
        return "none" if value is None else str(value).lower()
    return str(value)


def _range(field: Mapping[str, Any]) -> str:
    """Type and bounds of a field, from its JSON schema."""
    if "enum" in field:
        return " | ".join(map(str, field["enum"]))
    if "anyOf" in field:
        return " or ".join(_range(option) for option in field["anyOf"])
    bounds = [
        f"{sign} {field[key]:g}"
        for key, sign in (
            ("exclusiveMinimum", ">"),
            ("minimum", "≥"),
            ("exclusiveMaximum", "<"),
            ("maximum", "≤"),
        )
        if key in field
    ]
    kind = {
        "number": "number",
        "integer": "whole number",
        "boolean": "true | false",
        "string": "text",
        "null": "none",
    }
    return " ".join([kind.get(field.get("type", ""), str(field.get("type", ""))), ", ".join(bounds)]).strip()
