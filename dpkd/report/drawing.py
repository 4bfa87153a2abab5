"""Panels drawn by matplotlib: the same figure as SVG in the page and as a PNG file for papers and slides.

In the SVG each color of the figure becomes a CSS variable of the page, so that one drawing serves light and dark.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup, escape

from dpkd.io import whole_file
from dpkd.report.charts import (
    BarPanel,
    ForestPanel,
    LinePanel,
    Panel,
    PointPanel,
    ScatterPanel,
    chapters,
    length_panels,
)
from dpkd.report.names import compact
from dpkd.report.reading import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# One for each of twenty runs. Markers and dashes tell runs apart where colors do not: in print, to some readers.
PALETTE = (
    *("#2a78d6", "#e0632a", "#14936b", "#8a4fd0", "#c98a00", "#d6457f", "#4d7c0f", "#5a6472", "#0e9bb5", "#a33a2a"),
    *("#3f4fc4", "#b55fd0", "#1f6f5c", "#e58a7a", "#6fa3e3", "#8fae2b", "#8a6a45", "#c226a6", "#53b0a4", "#7a1f4f"),
)
INK, MUTED, LINE, GRID = "#1b1b19", "#66655f", "#cfcec8", "#ecebe6"
VARIABLES = {
    **{color: f"var(--c{index})" for index, color in enumerate(PALETTE)},
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    LINE: "var(--axis)",
    GRID: "var(--grid)",
}
DASHES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D", "v", "P", "*", "X")
GLYPHS = "●■▲◆▼✚★✖"  # the same in a page's text
DPI = 200
_WIDE = 5.0  # inches: names beside their intervals
_STEPS = [1, 2, 2.5, 5, 10]  # between the numbers on an axis
FEW_BARS = 9  # up to here each bar has its value above it
LONGEST_NAME = 40  # characters of a name in a legend
_COLOR = re.compile("|".join(VARIABLES))
_STYLE: Any = {  # matplotlib's type for it lists every key
    "svg.fonttype": "none",
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": LINE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": GRID,
    "xtick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "ytick.left": False,
    "lines.linewidth": 1.7,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "legend.fontsize": 7.5,
    "legend.handlelength": 3.2,
}


def svg(panel: Panel) -> Markup:
    """The drawing as an element of a page, without title and legend: the page has them as text."""
    from matplotlib import rc_context

    out = io.BytesIO()
    with rc_context({**_STYLE, "svg.hashsalt": panel.key}), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a letter that the font does not have is the browser's matter
        _figure(panel).savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = out.getvalue().decode("utf-8")
    drawing = text[text.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", drawing[drawing.index(">") + 1 :], flags=re.S)
    body = re.sub(r'<g id="[^"]*"', "<g", body)  # names of parts that every drawing has
    body = _COLOR.sub(lambda found: VARIABLES[found[0]], body)
    view = re.search(r'viewBox="([\d. ]+)"', drawing)
    assert view is not None
    about = escape(f"{panel.title}. {panel.note}" if panel.note else panel.title)
    return Markup(
        f'<svg class="chart" viewBox="{view[1]}" role="img" aria-label="{about}" '
        f'xmlns:xlink="http://www.w3.org/1999/xlink">{body.strip()}'
    )


def figures(runs: Sequence[Run]) -> list[Panel]:
    """All charts of a page about these runs."""
    return [*(panel for chapter in chapters(runs) for panel in chapter.panels), *length_panels(runs)]


def write_figures(panels: Sequence[Panel], folder: Path) -> list[Path]:
    """One PNG file per chart, named after it."""
    folder.mkdir(parents=True, exist_ok=True)
    return [_write_png(panel, folder / f"{panel.key[:200]}.png") for panel in panels]


def _write_png(panel: Panel, path: Path) -> Path:
    from matplotlib import rc_context

    with rc_context(_STYLE), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        figure = _figure(panel)
        (axes, *_) = figure.axes
        axes.set_title(_printable(panel.title), loc="left", fontsize=10, fontweight="bold")
        if isinstance(panel, LinePanel):
            axes.set_ylabel(panel.note)
        if len(axes.get_legend_handles_labels()[1]) > 1:
            axes.legend(ncols=1 + len(axes.get_legend_handles_labels()[1]) // 8)
        with whole_file(path) as unfinished:
            figure.savefig(unfinished, dpi=DPI, format="png")
    return path


def _figure(panel: Panel) -> Figure:
    # No pyplot: it would choose a backend and keep every figure for the whole process.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDE if isinstance(panel, ForestPanel) else 4.5, _height(panel)), layout="constrained")
    axes = figure.add_subplot()
    axes.yaxis.set_major_formatter(lambda value, _: compact(value))
    if isinstance(panel, ForestPanel):
        _forest(panel, axes)
    elif isinstance(panel, PointPanel):
        _points(panel, axes, figure)
    elif isinstance(panel, LinePanel):
        _lines(panel, axes)
    elif isinstance(panel, BarPanel):
        _bars(panel, axes)
    else:
        _scatter(panel, axes, figure)
    return figure


def _printable(text: str) -> str:
    """A text that fits into a legend and into XML; a leading underscore would hide it from matplotlib's legend.

    >>> _printable("_a\\x00b")
    '\\u200b_ab'
    """
    shown = "".join(c for c in text if c.isprintable() and not "\ud800" <= c <= "\udfff")
    shown = shown if len(shown) <= LONGEST_NAME else f"{shown[: LONGEST_NAME - 1]}…"
    return f"\u200b{shown}" if shown.startswith("_") else shown


def _height(panel: Panel) -> float:
    return 0.7 + 0.2 * max(4, len(panel.estimates)) if isinstance(panel, ForestPanel) else 2.8


def _color(index: int | None) -> str:
    return MUTED if index is None else PALETTE[index % len(PALETTE)]


def _marker(index: int | None) -> str:
    return "h" if index is None else MARKERS[index % len(MARKERS)]


def _stroke(index: int) -> dict[str, Any]:
    return {"color": _color(index), "linestyle": dashes(index), "marker": _marker(index)}


def dashes(index: int) -> str:
    """Those of a run: others than its neighbors', and others than those of the next run with the same marker.

    >>> [dashes(index) for index in (0, 1, 2, 3, 4, 7, 8)]
    ['-', '--', ':', '-.', '-', '-.', '--']
    """
    return DASHES[(index + index // len(MARKERS)) % len(DASHES)]


def _lines(panel: LinePanel, axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    for place, curve in enumerate(panel.curves):
        values = [float("nan") if value is None else value for value in curve.values]
        # A single value between gaps is no line: only a dot shows it.
        dots = [
            i
            for i, value in enumerate(curve.values)
            if value is not None
            and (
                curve.dots
                or all(other is None for other in (*curve.values[max(0, i - 1) : i], *curve.values[i + 1 : i + 2]))
            )
        ]
        axes.plot(
            curve.steps,
            values,
            label=_printable(curve.label),
            markersize=4.8,
            markeredgewidth=0,
            markevery=sorted({*dots, *_some(len(values), place)}) if len(panel.curves) > 1 else dots,
            **_stroke(curve.color),
        )
    axes.set_xlabel(panel.x_label)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=panel.x_label == "step", steps=_STEPS))
    axes.xaxis.set_major_formatter(lambda value, _: compact(value))
    axes.yaxis.set_major_locator(MaxNLocator(4, steps=_STEPS))
    if panel.limits is not None:
        low, high = panel.limits
        room = 0.02 * (high - low)  # a line along an end is seen whole
        axes.set_ylim(low - room, high + room)
    else:
        axes.set_ylim(*value_range([value for curve in panel.curves for value in curve.values if value is not None]))


def _some(count: int, place: int) -> range:
    """Some five points of a line for its markers; those of lines that run together are beside each other."""
    apart = max(1, count // 5)
    return range((count // 10 + place * max(1, apart // 4)) % apart, count, apart)


def _forest(panel: ForestPanel, axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    for place, one in enumerate(panel.estimates):
        if one.interval is not None:
            axes.plot(one.interval, (place, place), color=_color(one.color), linewidth=1.3, solid_capstyle="butt")
        if len(one.seeds) > 1:
            axes.plot(one.seeds, [place] * len(one.seeds), "|", color=_color(one.color), markersize=7)
        axes.plot(one.mean, place, marker=_marker(one.color), color=_color(one.color), markersize=5)
    axes.set_ylim(len(panel.estimates) - 0.4, -1.1 if panel.lines else -0.6)
    axes.set_yticks(range(len(panel.estimates)), [_printable(one.label) for one in panel.estimates])
    axes.tick_params(axis="y", labelsize=8, length=0)
    for name, value in panel.lines:
        axes.axvline(value, color=MUTED, linewidth=0.9, linestyle="--", zorder=1)
        axes.text(value, -0.62, f" {_printable(name)}", color=MUTED, fontsize=7.5, va="bottom")
    axes.grid(axis="x")
    axes.grid(visible=False, axis="y")
    axes.set_xlabel(panel.x_label)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=_STEPS))


def _points(panel: PointPanel, axes: Axes, figure: Figure) -> None:
    from matplotlib import colormaps
    from matplotlib.ticker import MaxNLocator

    values = [point.value for point in panel.points if point.value is not None]
    low, high = value_range(values) if len(set(values)) < 2 else (min(values), max(values))
    shades = colormaps["viridis"].resampled(12)
    for point in panel.points:
        if point.interval is not None:
            axes.plot((point.x, point.x), point.interval, color=_color(point.color), linewidth=0.8, alpha=0.5)
        shown = shades((point.value - low) / (high - low)) if point.value is not None else _color(point.color)
        axes.plot(
            point.x, point.y, _marker(point.color), color=shown, markersize=6, markeredgecolor=LINE, markeredgewidth=0.5
        )
        axes.annotate(point.tag, (point.x, point.y), xytext=(4, 3), textcoords="offset points", fontsize=7, color=MUTED)
    for name, value in panel.lines:
        axes.axhline(value, color=MUTED, linewidth=0.9, linestyle="--", zorder=1)
        axes.annotate(
            _printable(name),
            (1, value),
            xycoords=("axes fraction", "data"),
            ha="right",
            va="bottom",
            fontsize=7.5,
            color=MUTED,
        )
    if panel.front:
        xs, ys = zip(*panel.front, strict=True)
        end = max(point.x for point in panel.points)
        axes.step([*xs, end], [*ys, ys[-1]], where="post", color=MUTED, linewidth=1.0, zorder=1)
    axes.margins(0.08)
    axes.set_xlabel(panel.x_label)
    axes.set_ylabel(panel.y_label)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=_STEPS))
    axes.xaxis.set_major_formatter(lambda value, _: compact(value))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=_STEPS))
    if values:
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import Normalize

        scale = ScalarMappable(Normalize(low, high), shades)
        bar = figure.colorbar(scale, ax=axes, label=panel.value_label, ticks=MaxNLocator(4, steps=_STEPS))
        bar.outline.set_visible(False)


def _bars(panel: BarPanel, axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    names = list(dict.fromkeys((bar.label, bar.color) for _, _, bars in panel.groups for bar in bars))
    width = min(0.45, 0.8 / max(1, len(names)))
    few = sum(len(bars) for _, _, bars in panel.groups) <= FEW_BARS
    for place, (name, color) in enumerate(names):
        found = [(group, bar) for group, (_, _, bars) in enumerate(panel.groups) for bar in bars if bar.label == name]
        drawn = axes.bar(
            [group + (place - (len(names) - 1) / 2) * width for group, _ in found],
            [bar.mean for _, bar in found],
            width * 0.92,
            yerr=[bar.sd or 0.0 for _, bar in found],
            label=_printable(name),
            color=PALETTE[color % len(PALETTE)],
            error_kw={"elinewidth": 0.9, "ecolor": MUTED},
        )
        if few:
            axes.bar_label(drawn, [f"{bar.mean:.1f}" for _, bar in found], padding=2, color=MUTED, fontsize=7.5)
    axes.margins(y=0.12)
    axes.yaxis.set_major_locator(MaxNLocator(4, steps=_STEPS))
    axes.set_xticks(range(len(panel.groups)), [f"{label}\n{about}" for label, about, _ in panel.groups])
    axes.set_xlim(-0.6, len(panel.groups) - 0.4)


def _scatter(panel: ScatterPanel, axes: Axes, figure: Figure) -> None:
    from matplotlib import colormaps
    from matplotlib.ticker import MaxNLocator

    values = [value for trail in panel.trails for _, _, value in trail.points]
    low, high = value_range(values) if len(set(values)) == 1 else (min(values), max(values))
    for trail in panel.trails:
        xs, ys, own = zip(*trail.points, strict=True)
        axes.plot(
            xs, ys, alpha=0.6, label=_printable(trail.label), **{**_stroke(trail.color), "linewidth": 1.0, "marker": ""}
        )
        dots = axes.scatter(
            xs, ys, c=own, vmin=low, vmax=high, cmap=colormaps["viridis"].resampled(12), zorder=3, edgecolors=LINE
        )
    axes.set_xlabel(panel.x_label)
    axes.set_ylabel(panel.y_label)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=_STEPS))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=_STEPS))
    bar = figure.colorbar(dots, label=panel.value_label, ticks=MaxNLocator(4, steps=_STEPS))
    bar.outline.set_visible(False)


def value_range(values: Sequence[float]) -> tuple[float, float]:
    """Ends of an axis: the values with a little room, and zero where it is not far away.

    >>> value_range([1.0, 10.0]), value_range([5.0]), value_range([0.0])
    ((0.0, 10.45), (4.5, 5.5), (0.0, 1.0))
    """
    if not any(values):
        return 0.0, 1.0
    low, high = min(values), max(values)
    room = 0.05 * (high - low) if high > low else max(abs(high) * 0.1, 1e-6)
    bottom = 0.0 if 0 <= low < 0.35 * high else low - room
    top = 0.0 if 0 >= high > 0.35 * low else high + room
    return bottom, top
