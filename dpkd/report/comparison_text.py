"""A comparison as text: grids for people, Markdown, LaTeX; long CSV and JSON for programs."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from dpkd.report.comparison import Cell, Comparison, SetTable
from dpkd.report.escapes import csv_cell, latex_text, line, markdown_text
from dpkd.report.names import duration, memory, spread, tokens
from dpkd.report.reading import Cost

SIGNIFICANT = 0.05
_ARROWS = {"higher": " ↑", "lower": " ↓"}


@dataclass(frozen=True)
class Grid:
    """A table of text."""

    title: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def grids(comparison: Comparison) -> list[Grid]:
    """One table per set, and one of costs where any run was trained."""
    tables = [_grid(table, comparison) for table in comparison.sets]
    costs = [(run, comparison.costs[run]) for run in comparison.runs if comparison.costs[run] != Cost()]
    if costs:
        rows = tuple((run, duration(c.seconds), tokens(c.tokens), memory(c.peak_memory_mib)) for run, c in costs)
        tables.append(Grid("training cost", ("run", "time", "tokens", "peak memory"), rows))
    return tables


def _grid(table: SetTable, comparison: Comparison) -> Grid:
    heads = ["run", "rows", "seeds", *(f"{table.titles[m]}{_ARROWS.get(table.better[m], '')}" for m in table.metrics)]
    rows = []
    for run in comparison.runs:
        if run in table.cells:
            count, seeds = table.counts[run]
            name = f"{run} (baseline)" if run == comparison.baseline and len(comparison.runs) > 1 else run
            cells = [cell_text(table.cells[run].get(metric)) for metric in table.metrics]
            rows.append((name, f"{count:,}", str(seeds), *cells))
    return Grid(table.name, tuple(heads), tuple(rows))


def cell_text(cell: Cell | None) -> str:
    """`24.62 ± 0.31 (p = 0.012)*`; the star marks p < 0.05 after correction."""
    if cell is None:
        return "–"
    text = spread(cell.mean, cell.sd)
    if cell.difference is None:
        return text
    d = cell.difference
    return f"{text} (p {p_text(d.p)}){'*' if (d.p if d.corrected is None else d.corrected) < SIGNIFICANT else ''}"


def p_text(p: float) -> str:
    """`= 0.012`, or `< 0.001`."""
    return "< 0.001" if p < 0.001 else f"= {p:.3f}"


def footnotes(comparison: Comparison) -> list[str]:
    """What the tables mean, and what could not be compared."""
    tested = any(c.difference is not None for t in comparison.sets for own in t.cells.values() for c in own.values())
    explained = (
        f"mean ± sd over seeds; p: two-sided paired bootstrap against {comparison.baseline} over rows, averaged over "
        f"seeds, {comparison.resamples:,} resamples, seed {comparison.seed}; * p < {SIGNIFICANT} after "
        "Holm's correction for the number of runs"
    )
    return [explained if tested else "mean ± sd over seeds", *comparison.notes]


def as_markdown(comparison: Comparison) -> str:
    """GitHub tables."""
    parts = []
    for grid in grids(comparison):
        align = ["---", *["---:"] * (len(grid.heads) - 1)]
        lines = [f"| {' | '.join(map(markdown_text, row))} |" for row in (grid.heads, *grid.rows)]
        parts.append(
            "\n".join([f"**{markdown_text(grid.title)}**", "", lines[0], f"| {' | '.join(align)} |", *lines[1:]])
        )
    notes = "\n".join(f"- {markdown_text(note)}" for note in footnotes(comparison))
    return "\n\n".join([*parts, notes]) + "\n"


def as_latex(comparison: Comparison) -> str:
    """Tables for the package booktabs."""
    parts = ["% needs \\usepackage{booktabs}"]
    for grid in grids(comparison):
        lines = [f"{' & '.join(map(latex_text, row))} \\\\" for row in (grid.heads, *grid.rows)]
        body = [lines[0], "\\midrule", *lines[1:]]
        parts.append(
            "\n".join(
                [
                    "\\begin{table}",
                    "\\centering",
                    f"\\caption{{{latex_text(grid.title)}}}",
                    f"\\begin{{tabular}}{{l{'r' * (len(grid.heads) - 1)}}}",
                    "\\toprule",
                    *body,
                    "\\bottomrule",
                    "\\end{tabular}",
                    "\\end{table}",
                ]
            )
        )
    notes = [f"% {line(note)}" for note in footnotes(comparison)]
    return "\n\n".join([*parts, "\n".join(notes)]) + "\n"


def as_csv(comparison: Comparison) -> str:
    """One line per run, set and metric; costs have the set `(training)`."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        [
            "run",
            "set",
            "metric",
            "mean",
            "sd",
            "rows",
            "seeds",
            "unit",
            "difference",
            "low",
            "high",
            "p",
            "holm",
            "baseline",
        ]
    )
    for table in comparison.sets:
        for run in comparison.runs:
            for metric, cell in table.cells.get(run, {}).items():
                d = cell.difference
                tested: Sequence[object] = (
                    ("",) * 6 if d is None else (d.mean, d.low, d.high, d.p, d.corrected, comparison.baseline)
                )
                row = [run, table.name, metric, cell.mean, "" if cell.sd is None else cell.sd, *table.counts[run]]
                writer.writerow(map(csv_cell, [*row, table.units.get(metric, ""), *tested]))
    for run in comparison.runs:
        for name, value in asdict(comparison.costs[run]).items():
            if value is not None:
                writer.writerow(map(csv_cell, [run, "(training)", name, value, *[""] * 10]))
    return text.getvalue()


def as_json(comparison: Comparison) -> str:
    """Everything, with full precision."""
    return json.dumps(asdict(comparison), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
