"""The charts of a report as PNG files, for papers and slides; needs matplotlib (the extra `report`)."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dpkd.report.chapters import chapters, length_panels
from dpkd.report.panels import BarPanel, LinePanel, Panel, ScatterPanel
from dpkd.report.reading import Run
from dpkd.report.scales import value_range

COLOURS = ("#2a78d6", "#e0632a", "#14936b", "#8a4fd0", "#c98a00", "#d6457f", "#4d7c0f", "#5a6472")  # the page's
DASHES = ("-", "--", ":", "-.")
DPI = 200


def write_figures(runs: Sequence[Run], folder: Path) -> list[Path] | None:
    """One PNG file per chart, named after it; None, and nothing is written, where matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        return None
    panels = [panel for chapter in chapters(runs) for panel in chapter.panels]
    folder.mkdir(parents=True, exist_ok=True)
    return [_write(panel, folder / f"{panel.key}.png") for panel in [*panels, *length_panels(runs)]]


def _write(panel: Panel, path: Path) -> Path:
    # No pyplot: it would choose a backend and keep every figure for the whole process.
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style: Any = {"font.family": "DejaVu Sans", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    with rc_context(style):
        figure = Figure(figsize=(4.8, 3.0), layout="constrained")
        axes = figure.add_subplot()
        axes.set_title(panel.title, loc="left", fontsize=10, fontweight="bold")
        axes.grid(axis="y", color="#e6e5e0", linewidth=0.8)
        axes.set_axisbelow(True)
        if isinstance(panel, LinePanel):
            _lines(panel, axes)
        elif isinstance(panel, BarPanel):
            _bars(panel, axes)
        else:
            _scatter(panel, axes, figure)
        figure.savefig(path, dpi=DPI)
    return path


def _style(index: int) -> dict[str, Any]:
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": DASHES[index // len(COLOURS) % len(DASHES)]}


def _lines(panel: LinePanel, axes: Any) -> None:
    for curve in panel.curves:
        values = [float("nan") if value is None else value for value in curve.values]
        marker = "o" if curve.dots else None
        axes.plot(curve.steps, values, label=curve.label, marker=marker, markersize=3.5, **_style(curve.colour))
    axes.set_xlabel("step")
    axes.set_ylabel(panel.note)
    if panel.limits is not None:
        low, high = panel.limits
        room = 0.02 * (high - low)  # a line along an end is seen whole
        axes.set_ylim(low - room, high + room)
    if len(panel.curves) > 1 or panel.by_run:
        axes.legend(frameon=False)


def _bars(panel: BarPanel, axes: Any) -> None:
    names = list(dict.fromkeys((bar.label, bar.colour) for _, _, bars in panel.groups for bar in bars))
    width = min(0.45, 0.8 / max(1, len(names)))
    for place, (name, colour) in enumerate(names):
        found = [(group, bar) for group, (_, _, bars) in enumerate(panel.groups) for bar in bars if bar.label == name]
        where = [group + (place - (len(names) - 1) / 2) * width for group, _ in found]
        sds = [bar.sd or 0.0 for _, bar in found]
        axes.bar(
            where,
            [bar.mean for _, bar in found],
            width * 0.92,
            yerr=sds,
            label=name,
            color=COLOURS[colour % len(COLOURS)],
            error_kw={"elinewidth": 0.9},
        )
    axes.set_xticks(range(len(panel.groups)), [f"{label}\n{about}" for label, about, _ in panel.groups])
    axes.set_xlim(-0.6, len(panel.groups) - 0.4)
    axes.set_xlabel(panel.note, fontsize=8)
    if len(names) > 1:
        axes.legend(frameon=False)


def _scatter(panel: ScatterPanel, axes: Any, figure: Any) -> None:
    values = [point.value for trail in panel.trails for point in trail.points]
    low, high = value_range(values) if len(set(values)) == 1 else (min(values), max(values))
    dots = None
    for trail in panel.trails:
        xs, ys = [p.x for p in trail.points], [p.y for p in trail.points]
        axes.plot(xs, ys, linewidth=0.9, alpha=0.6, label=trail.label, **_style(trail.colour))
        dots = axes.scatter(xs, ys, c=[p.value for p in trail.points], vmin=low, vmax=high, cmap="viridis", zorder=3)
    axes.set_xlabel(panel.x_label)
    axes.set_ylabel(panel.y_label)
    if dots is not None:
        figure.colorbar(dots, label=panel.value_label)
    if len(panel.trails) > 1:
        axes.legend(frameon=False)
