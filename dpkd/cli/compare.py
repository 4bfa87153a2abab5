"""Two losses side by side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from dpkd.cli.describe import facts, range_text, short_link, value_text

if TYPE_CHECKING:
    from rich.console import Console

    from dpkd.plugins import RegisteredLoss

ABSENT = "—"  # the loss has no such setting


@dataclass(frozen=True)
class SettingDifference:
    """One aspect of two losses: what each says, and whether that is the same."""

    what: str
    first: str
    second: str

    @property
    def same(self) -> bool:
        return self.first == self.second


def compare(
    first: RegisteredLoss, first_row: Mapping[str, Any], second: RegisteredLoss, second_row: Mapping[str, Any]
) -> list[SettingDifference]:
    """Formula, family, text, needs, promises, advice and every setting of two losses, the same aspects of both."""
    one, other = _aspects(first, first_row), _aspects(second, second_row)
    ordered = [*one, *(what for what in other if what not in one)]
    return [SettingDifference(what, one.get(what, ABSENT), other.get(what, ABSENT)) for what in ordered]


def _aspects(loss: RegisteredLoss, row: Mapping[str, Any]) -> dict[str, str]:
    card = loss.spec.card
    told = {"title": card.title, "summary": card.summary, "formula": card.formula}
    told |= {"reads": ", ".join(sorted(loss.spec.signals())), **facts(loss, row)}
    told["from"] = f"{loss.distribution} {loss.version}"
    return told | _settings(loss.spec.config.model_json_schema())


def _settings(schema: Mapping[str, Any]) -> dict[str, str]:
    return {
        f"loss.{name}": f"{value_text(field.get('default'))}\n[{range_text(field)}]\n{field.get('description', '')}"
        for name, field in schema.get("properties", {}).items()
    }


def as_json(names: tuple[str, str], rows: list[SettingDifference]) -> dict[str, Any]:
    """The comparison as plain data."""
    return {"losses": list(names), "rows": [{**asdict(row), "same": row.same} for row in rows]}


def _with_short_links(row: SettingDifference) -> SettingDifference:
    """With the number at arXiv or the site in place of an address, which no column holds."""
    if row.what != "sources":
        return row
    first, second = (
        "\n".join(short_link(line) if line.startswith("https://") else line for line in text.splitlines())
        for text in (row.first, row.second)
    )
    return SettingDifference(row.what, first, second)


def _longest_word(row: SettingDifference) -> int:
    from rich.cells import cell_len

    return max((cell_len(word) for word in f"{row.first} {row.second}".split()), default=0)


def print_comparison(names: tuple[str, str], rows: list[SettingDifference], console: Console | None = None) -> None:
    """Print the two beside each other; ≠ marks what differs."""
    from rich import box
    from rich.console import Console as Terminal
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_lines=False)
    table.add_column("", no_wrap=True)
    table.add_column("", style="dim", min_width=12, max_width=24)
    for name in names:
        table.add_column(name, ratio=1, overflow="fold")
    console = console or Terminal()
    width = (console.width - 13 - max(12, min(24, max(len(row.what) for row in rows)))) // 2
    rows = [_with_short_links(row) for row in rows]
    narrow = [row for row in rows if _longest_word(row) <= width]
    for row in narrow:
        style = "dim" if row.same else ""
        table.add_row("" if row.same else "≠", row.what, Text(row.first, style), Text(row.second, style))
    for row in rows:  # a formula is broken at spaces alone
        if row not in narrow:
            console.print(f" {' ' if row.same else '≠'}   {row.what}", highlight=False)
            for name, said in zip(names, (row.first, row.second), strict=True):
                console.print(Padding(Text(f"{name}: {said}"), (0, 0, 0, 7)))
    console.print(table)
    different = sum(not row.same for row in rows)
    console.print(f"{different} of {len(rows)} differ (≠); {ABSENT}: has no such setting")
