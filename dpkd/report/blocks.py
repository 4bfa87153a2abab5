"""What a section of the page is made of; the template has a macro for each class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from dpkd.report.names import number


@dataclass(frozen=True)
class TableCell:
    """A cell of a table; `kind` is its CSS class: `n` (a number), `n best`, `mono`, `dim`. `color` is that of a run."""

    text: str
    kind: str = ""
    color: int | None = None


@dataclass(frozen=True)
class Table:
    """Rows under heads; the first cell of a row is its head. `note` stands beside the caption in small type."""

    heads: Sequence[TableCell]
    rows: Sequence[Sequence[TableCell]]
    caption: str = ""
    note: str = ""
    wide: bool = False


@dataclass(frozen=True)
class Tile:
    """A number with what it is."""

    what: str
    value: str
    small: str = ""


@dataclass(frozen=True)
class Key:
    """An entry of a chart's legend: a color (None: no swatch), a name and a value."""

    color: int | None
    label: str
    value: str


@dataclass(frozen=True)
class Drawing:
    """A chart with its title, note and legend."""

    title: str
    note: str
    keys: Sequence[Key]
    svg: Markup


@dataclass(frozen=True)
class Token:
    """A token with its reward (None: none), as a percentage of the strongest color with a sign."""

    text: str
    reward: float | None
    strength: int

    @property
    def told(self) -> str:
        return "" if self.reward is None else f"{self.reward:+.3f}"


@dataclass(frozen=True)
class Note:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Legend:
    """What the colors of several charts mean."""

    keys: Sequence[Key]


@dataclass(frozen=True)
class Column:
    """A text, or shaded tokens, with who wrote it and the color of that run."""

    who: str
    note: str
    text: str = ""
    tokens: Sequence[Token] = ()
    color: int | None = None


@dataclass(frozen=True)
class Sample:
    """A prompt with answers side by side; `more` of them are behind a line that opens them."""

    where: str
    prompt: str
    columns: Sequence[Column]
    more: Sequence[Column] = ()


@dataclass(frozen=True)
class Shades:
    """The scale of the colors of tokens."""

    top: float

    @property
    def told(self) -> str:
        return number(self.top)


@dataclass(frozen=True)
class FactList:
    """Lines of one run, and links to papers: (title, URL, where in it)."""

    name: str
    lines: Sequence[tuple[str, str]]
    links: Sequence[tuple[str, str, str]]


@dataclass(frozen=True)
class Folded:
    """Blocks behind a line that opens them."""

    title: str
    blocks: Sequence[Block]
    is_open: bool = False


@dataclass(frozen=True)
class Group:
    """Blocks of one kind side by side; `kind` is the CSS class of their frame: `tiles`, `grid` or `grid broad`."""

    kind: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Section:
    """A part of the page with an anchor."""

    key: str
    title: str
    about: str
    blocks: Sequence[Block]


Block = Table | Tile | Drawing | Note | Legend | Sample | Shades | FactList | Folded | Group
