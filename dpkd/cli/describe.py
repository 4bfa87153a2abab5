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
    from dpkd.plugins import RegisteredLoss


def print_card(loss: RegisteredLoss, row: Mapping[str, Any], console: Console | None = None) -> None:
    """Print everything that a user reads before choosing a loss."""
    console = console or Console()
    spec, card = loss.spec, loss.spec.card
    console.print(Text.assemble((spec.name, "bold"), f"  {card.title}"))
    console.print(card.summary, highlight=False)
    console.print(Padding(Text(card.formula), (1, 4)))
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    for key, value in facts(loss, row).items():
        if value:
            table.add_row(key, Text(value))
    console.print(table)
    _print_settings(spec.config.model_json_schema(), console)


def facts(loss: RegisteredLoss, row: Mapping[str, Any]) -> dict[str, str]:
    """What a card says beside title, summary, formula and settings, in order; empty where it says nothing."""
    spec, card = loss.spec, loss.spec.card
    return {
        "family": spec.family.value,
        "text by": ", ".join(row["text"]),
        "needs of the teacher": row["needs"],
        "use when": card.use_when,
        "avoid when": card.avoid_when,
        "unconfirmed": card.unconfirmed,
        "notes": card.notes,
        "preset of": spec.preset_of,
        "promises": ", ".join(sorted(spec.traits)),
        "sources": "\n".join(f"{s.title}{f', {s.where}' if s.where else ''}\n{s.url}" for s in card.sources),
        "suggests": "\n".join(f"{path}={value}" for path, value in _leaves(spec.suggests)),
        "from": loss.origin,
    }


def short_link(address: str) -> str:
    """A link for a narrow column: the number at arXiv, the project at GitHub, else the site.

    >>> [short_link(f"https://{rest}") for rest in ("arxiv.org/abs/2306.13649", "github.com/huggingface/trl", "")]
    ['arXiv 2306.13649', 'github trl', '']
    """
    host, _, path = address.removeprefix("https://").partition("/")
    parts = path.split("/")
    if host == "arxiv.org":
        return f"arXiv {parts[-1]}"
    return f"github {parts[1]}" if host == "github.com" and len(parts) > 1 else host.removeprefix("www.")


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
            value_text(field.get("default")),
            range_text(field),
            field.get("description", ""),
            field.get("source", ""),
        )
    console.print(table)


def value_text(value: Any) -> str:
    """A setting's value as a user would write it."""
    if value is None or isinstance(value, bool):  # not a dict of these: 1.0 == True
        return "none" if value is None else str(value).lower()
    return str(value)


def range_text(field: Mapping[str, Any]) -> str:
    """Type and bounds of a field, from its JSON schema."""
    if "enum" in field:
        return " | ".join(map(str, field["enum"]))
    if "anyOf" in field:
        return " or ".join(range_text(option) for option in field["anyOf"])
    bounds = [
        f"{sign} {field[key]:g}"
        for key, sign in (("exclusiveMinimum", ">"), ("minimum", "≥"), ("exclusiveMaximum", "<"), ("maximum", "≤"))
        if key in field
    ]
    kind = {"number": "number", "integer": "whole number", "boolean": "true | false", "string": "text", "null": "none"}
    return " ".join([kind.get(field.get("type", ""), str(field.get("type", ""))), ", ".join(bounds)]).strip()
