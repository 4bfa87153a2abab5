"""One self-contained page about one or several runs: no network, no script; it opens from disk."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from dpkd.io import write_bytes
from dpkd.report import sections, texts
from dpkd.report.blocks import Block, Drawing, Group, Key, Section
from dpkd.report.charts import BarPanel, LinePanel, Panel, chapters, length_panels
from dpkd.report.drawing import PALETTE, svg
from dpkd.report.names import number
from dpkd.report.reading import Run


def write_page(runs: Sequence[Run], output: Path) -> None:
    """Write the page; it appears whole or not at all."""
    # Half a surrogate pair in a model's answer has no UTF-8; a question mark stands for it.
    write_bytes(output, page(runs).encode("utf-8", errors="replace"))


def page(runs: Sequence[Run]) -> str:
    """The page as HTML."""
    environment = Environment(
        loader=PackageLoader("dpkd.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    one = f"{runs[0].loss} · a distillation run" if len(runs) == 1 and runs[0].loss else f"{len(runs)} runs compared"
    return environment.get_template("report.html").render(
        names=", ".join(run.name for run in runs),
        eyebrow=one,
        subtitle=sections.subtitle(runs),
        sections=_sections(runs),
        palette=PALETTE,
        version=version("dpkd"),
    )


def _sections(runs: Sequence[Run]) -> list[Section]:
    """Those that have something to say, in the order of the page."""
    seeds = "Mean ± standard deviation over seeds."
    best = f"{seeds} The best run of a row is bold." if len(runs) > 1 else seeds
    found = [
        Section("overview", "Overview", "", sections.overview(runs)),
        Section("scores", "Scores", best, [*sections.scores(runs), *_grid(length_panels(runs))]),
        *(Section(own.key, own.title, own.about, _grid(own.panels)) for own in chapters(runs)),
        Section("samples", "Samples", "What the models write.", texts.samples(runs)),
        Section("tokens", "Reward by token", "Each token, shaded by its implicit reward.", texts.tokens(runs)),
        Section("settings", "Settings", "", sections.settings(runs)),
        Section("technical", "Data, versions, sources", "", sections.technical(runs)),
    ]
    return [section for section in found if section.blocks]


def _grid(panels: Sequence[Panel]) -> list[Block]:
    drawings = [Drawing(panel.title, panel.note, _keys(panel), svg(panel)) for panel in panels]
    return [Group("grid", drawings)] if drawings else []


def _keys(panel: Panel) -> list[Key]:
    """The legend: names and last values of curves, names of bars and trails where there are several."""
    if isinstance(panel, LinePanel):
        if len(panel.curves) == 1 and not panel.by_run:
            return [Key(None, "last", number(panel.curves[0].last))]
        return [Key(curve.color, curve.label, number(curve.last)) for curve in panel.curves]
    if isinstance(panel, BarPanel):
        names = {bar.label: bar.color for _, _, bars in panel.groups for bar in bars}
    else:
        names = {trail.label: trail.color for trail in panel.trails}
    return [Key(color, name, "") for name, color in names.items()] if len(names) > 1 else []
