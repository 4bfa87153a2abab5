"""One self-contained page about runs, or about a sweep: no network, no script; it opens from disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from dpkd.io import write_bytes
from dpkd.report import sections, sweep_sections, texts
from dpkd.report.blocks import Block, Drawing, Folded, Group, Key, Legend, Section
from dpkd.report.charts import BarPanel, ForestPanel, LinePanel, Panel, PointPanel, chapters, length_panels
from dpkd.report.drawing import GLYPHS, PALETTE, svg
from dpkd.report.experiment import Experiment
from dpkd.report.names import number
from dpkd.report.ranking import Standing, sets_of, standings
from dpkd.report.reading import Run
from dpkd.report.sweep_charts import budget_panels, collapse_panels, cost_panels, ranking_panels, reward_panels


def write_page(runs: Sequence[Run], output: Path) -> None:
    """Write the page; it appears whole or not at all."""
    # Half a surrogate pair in a model's answer has no UTF-8; a question mark stands for it.
    write_bytes(output, page(runs).encode("utf-8", errors="replace"))


def write_sweep_page(experiment: Experiment, output: Path) -> None:
    """Write the page of a sweep; it appears whole or not at all."""
    write_bytes(output, sweep_page(experiment).encode("utf-8", errors="replace"))


def page(runs: Sequence[Run]) -> str:
    """The page as HTML."""
    one = f"{runs[0].loss} · a distillation run" if len(runs) == 1 and runs[0].loss else f"{len(runs)} runs compared"
    return _rendered(", ".join(run.name for run in runs), one, sections.subtitle(runs), _sections(runs))


def sweep_page(experiment: Experiment) -> str:
    """The page of a sweep as HTML."""
    count = len(experiment.methods)
    about = sections.subtitle(experiment.methods) if count else ""
    return _rendered(experiment.name, f"a sweep · {count} methods", about, _sweep_sections(experiment))


def _rendered(name: str, eyebrow: str, subtitle: str, shown: Sequence[Section]) -> str:
    environment = Environment(
        loader=PackageLoader("dpkd.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("report.html").render(
        names=name,
        eyebrow=eyebrow,
        subtitle=subtitle,
        sections=[section for section in shown if section.blocks],
        palette=PALETTE,
        glyphs=GLYPHS,
        version=version("dpkd"),
    )


def _sections(runs: Sequence[Run]) -> list[Section]:
    """In the order of the page."""
    seeds = "Mean ± standard deviation over seeds."
    best = f"{seeds} The best run of a row is bold." if len(runs) > 1 else seeds
    return [
        Section("overview", "Overview", "", sections.overview(runs)),
        Section("scores", "Scores", best, [*sections.scores(runs), *_grid(length_panels(runs))]),
        *(Section(own.key, own.title, own.about, _grid(own.panels)) for own in chapters(runs)),
        Section("samples", "Samples", "What the models write.", texts.samples(runs)),
        Section("tokens", "Reward by token", "Each token, shaded by its implicit reward.", texts.tokens(runs)),
        Section("settings", "Settings", "", sections.settings(runs)),
        Section("technical", "Data, versions, sources", "", sections.technical(runs)),
    ]


def _sweep_sections(experiment: Experiment) -> list[Section]:
    """In the order of the page: what was found, then how."""
    tables = {name: standings(experiment, name) for name in sets_of(experiment, ranked=True)}
    runs, colors = [run for run, _ in experiment.members], [color for _, color in experiment.members]
    curves: list[Block] = [Folded(own.title, _grid(own.panels, keys=False)) for own in chapters(runs, colors)]
    if curves:
        curves.insert(0, Legend(sweep_sections.legend(experiment)))
    return [
        Section("overview", "Overview", "", sweep_sections.overview(experiment, tables)),
        Section("ranking", "Ranking", _RANKING, _ranking(experiment, tables)),
        Section("benchmarks", "Other sets", _OTHERS, sweep_sections.other_sets(experiment)),
        Section("cost", "Cost", _COST, _cost(experiment, tables)),
        Section("collapse", "Collapse", _COLLAPSE, _collapse(experiment)),
        Section("reward", "Reward and KL", _REWARD, _reward(tables)),
        Section("samples", "Samples", "The same prompts, answered by every model.", _samples(experiment, tables)),
        Section("choices", "Chosen settings", _CHOICES, sweep_sections.chosen(experiment)),
        Section("tokens", "Reward by token", "Each token, shaded by its implicit reward.", texts.tokens(runs)),
        Section("curves", "All curves", "", curves),
        Section("settings", "Settings", "", sweep_sections.differing_settings(experiment)),
        Section("technical", "Data, versions, sources", "", _folded("Each run", sections.technical(runs))),
    ]


_RANKING = "Best first. The intervals and p-values are about the rows: another training seed may move a mean further."
_OTHERS = "Standard benchmarks and other sets without Rouge-L. ±: sd over seeds, or standard error over rows."
_COST = (
    "Rouge-L against what training took, without the models that all share. The step line is the best method within "
    "each budget."
)
_COLLAPSE = (
    "A preference loss can grow its margin while both responses become less likely: log q(y_l) falls and drags "
    "log q(y_w) with it. Values are nats per token of the pairs trained on, under the student."
)
_REWARD = "Does the implicit reward r̂ = log q(y|x) / p(y|x) predict Rouge-L? Each point is a final model."
_CHOICES = "Each stage tried these values and kept the one that was best on dev rows; the stages that use it follow."
_AT_ONCE = 4  # answers to a prompt that are seen at once


def _ranking(experiment: Experiment, tables: Mapping[str, Sequence[Standing]]) -> list[Block]:
    blocks: list[Block] = []
    for name, table in tables.items():
        if any(one.rank for one in table):
            blocks += [
                *_grid(ranking_panels(table, name), keys=False),
                sweep_sections.ranking(table, name, experiment.baseline),
            ]
        blocks += [*sweep_sections.by_length(experiment, name), *sweep_sections.more_metrics(experiment, name)]
    return blocks


def _cost(experiment: Experiment, tables: Mapping[str, Sequence[Standing]]) -> list[Block]:
    blocks: list[Block] = []
    for name, table in tables.items():
        note = sweep_sections.about_tokens(table)
        best = sweep_sections.budgets(table, name)
        blocks += [*([note] if note else []), *_grid(cost_panels(table, name), keys=False)]
        blocks += [Group("grid broad", best)] if best else []
    return [*blocks, *_grid(budget_panels(experiment), keys=False)]


def _collapse(experiment: Experiment) -> list[Block]:
    panels = collapse_panels(experiment)
    return [*sweep_sections.collapse(experiment), *_grid(panels, keys=False)] if panels else []


def _reward(tables: Mapping[str, Sequence[Standing]]) -> list[Block]:
    return [
        block
        for name, table in tables.items()
        for block in (*_grid(reward_panels(table, name), keys=False), *sweep_sections.correlation_table(table, name))
    ]


def _samples(experiment: Experiment, tables: Mapping[str, Sequence[Standing]]) -> list[Block]:
    """References first, then the methods by their rank on the first set."""
    ranks = {one.run.name: one.rank for table in list(tables.values())[:1] for one in table}
    order = sorted(experiment.scored, key=lambda run: ranks.get(run.name, len(ranks) + 1))
    return [*texts.answers(order, sweep_sections.colors_by_name(experiment), sets=list(tables), first=_AT_ONCE)]


def _folded(title: str, blocks: Sequence[Block]) -> list[Block]:
    return [Folded(title, blocks)] if blocks else []


def _grid(panels: Sequence[Panel], *, keys: bool = True) -> list[Block]:
    """Charts side by side; without `keys`, the legend is elsewhere."""
    drawings = [Drawing(panel.title, panel.note, _keys(panel) if keys else [], svg(panel)) for panel in panels]
    kind = "grid broad" if any(isinstance(panel, ForestPanel) for panel in panels) else "grid"
    return [Group(kind, drawings)] if drawings else []


def _keys(panel: Panel) -> list[Key]:
    """The legend: names and last values of curves, names of bars and trails where there are several."""
    if isinstance(panel, LinePanel):
        if len(panel.curves) == 1 and not panel.by_run:
            return [Key(None, "last", number(panel.curves[0].last))]
        return [Key(curve.color, curve.label, number(curve.last)) for curve in panel.curves]
    if isinstance(panel, ForestPanel | PointPanel):
        return []  # names are in the drawing, and in the table beside it
    if isinstance(panel, BarPanel):
        names = {bar.label: bar.color for _, _, bars in panel.groups for bar in bars}
    else:
        names = {trail.label: trail.color for trail in panel.trails}
    return [Key(color, name, "") for name, color in names.items()] if len(names) > 1 else []
