"""What can be drawn, on the page and in PNG files alike: lines over steps, bars, and trails of points."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Curve:
    """A line: values over steps, None where there is no finite number; `colour` counts from 0."""

    label: str
    colour: int
    steps: tuple[float, ...]
    values: tuple[float | None, ...]
    dots: bool = False

    @property
    def last(self) -> float | None:
        """The last value that is a number."""
        return next((value for value in reversed(self.values) if value is not None), None)


@dataclass(frozen=True)
class LinePanel:
    """Curves over optimizer steps; `key` names its file, `limits` are the ends of the axis (None: what fits).

    `by_run`: the curves are runs, and their names say which.
    """

    key: str
    title: str
    curves: tuple[Curve, ...]
    note: str = ""
    limits: tuple[float, float] | None = None
    by_run: bool = False


@dataclass(frozen=True)
class Bar:
    """A mean with its standard deviation (None: not known)."""

    label: str
    colour: int
    mean: float
    sd: float | None


@dataclass(frozen=True)
class BarPanel:
    """Bars in named groups, each with a second line of text beneath its name."""

    key: str
    title: str
    groups: tuple[tuple[str, str, tuple[Bar, ...]], ...]
    note: str = ""


@dataclass(frozen=True)
class Point:
    """A moment of a run: two coordinates, and a third value that is shown as colour."""

    step: int
    x: float
    y: float
    value: float


@dataclass(frozen=True)
class Trail:
    """The moments of one run, in order."""

    label: str
    colour: int
    points: tuple[Point, ...]


@dataclass(frozen=True)
class ScatterPanel:
    """One trail per run; the third value of its points is shown as colour."""

    key: str
    title: str
    x_label: str
    y_label: str
    value_label: str
    trails: tuple[Trail, ...]
    note: str = ""


Panel = LinePanel | BarPanel | ScatterPanel


@dataclass(frozen=True)
class Chapter:
    """Panels that answer one question."""

    key: str
    title: str
    about: str
    panels: tuple[Panel, ...]
