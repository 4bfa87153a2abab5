"""What the page of a sweep shows, as blocks."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from dpkd.report.blocks import Block, Folded, Group, Key, Note, Table, TableCell, Tile
from dpkd.report.bootstrap import Difference
from dpkd.report.comparison_text import SIGNIFICANT, p_text
from dpkd.report.experiment import Experiment, StageChoice, members
from dpkd.report.names import duration, finite, memory, number, ordered, public, spread, title, tokens
from dpkd.report.ranking import RANKED_BY, Standing, front, sets_of
from dpkd.report.reading import Scored, better_of, title_of
from dpkd.report.sweep_charts import correlations, has_pairs, score_of
from dpkd.run_metrics import collapse_step, logps_per_token
from dpkd.settings import flat

_BESIDE = ("forward_kl", "reverse_kl", "nll")  # beside Rouge-L in the ranking


def overview(experiment: Experiment, tables: dict[str, list[Standing]]) -> list[Block]:
    """Tiles, then the runs that are missing."""
    done = [*experiment.methods, *experiment.references]
    costs = [run.cost.seconds for run, _ in experiment.members] + [
        run.cost.seconds for run in (*experiment.references, *experiment.tried.values())
    ]
    spent = sum(seconds for seconds in costs if seconds is not None)
    tiles = [Tile("models compared", str(len(experiment.methods))), Tile("training time of all runs", duration(spent))]
    if experiment.missing:
        tiles.append(Tile("runs missing", str(len(experiment.missing))))
    for name, table in tables.items():
        best = next((one for one in table if one.rank == 1), None)
        if best is not None:
            tiles.append(Tile(f"best Rouge-L on {name}: {best.run.name}", number(best.mean)))
        tiles += [Tile(f"{one.run.name} on {name}", number(one.mean)) for one in table if not one.rank]
    blocks: list[Block] = [Group("tiles", tiles)] if done else []
    if experiment.missing:
        rows = [
            [TableCell(row.get("name", "")), TableCell(row.get("state", "")), TableCell(row.get("reason", ""), "dim")]
            for row in experiment.missing
        ]
        blocks.append(
            Table(_heads("run", "state", "reason"), rows, "What is missing", "rerun the sweep to go on", True)
        )
    return blocks


def _heads(first: str, *rest: str, kind: str = "") -> list[TableCell]:
    return [TableCell(first), *(TableCell(text, kind) for text in rest)]


def ranking(table: Sequence[Standing], name: str, baseline: str) -> Table:
    """Best first: Rouge-L with interval and difference to the baseline, divergences, and cost."""
    methods = [one for one in table if one.rank]
    known = [one.scored for one in methods]
    shown = [metric for metric in _BESIDE if any(metric in one.metrics for one in known)]
    pooled = any(one.seeds for one in methods)
    heads = [
        *(["seeds"] if pooled else []),
        "Rouge-L",
        "95 %",
        "Δ",
        "p",
        *(title_of(metric, known) for metric in shown),
    ]
    bests = {metric: _best([score_of(one.run, name, metric) for one in methods]) for metric in shown}
    rows = []
    for one in table:
        values = [score_of(one.run, name, metric) for metric in shown]
        kinds = ["n best" if one.rank and v == bests[m] else "n" for m, v in zip(shown, values, strict=True)]
        cost = one.run.cost
        seeds = [TableCell(str(len(members(one.run))), "n dim")] if pooled else []
        cells = [
            *seeds,
            TableCell(number(one.mean), "n best" if one.rank == 1 else "n"),
            TableCell(_interval(one.interval), "n dim"),
            TableCell("baseline" if one.run.name == baseline else _difference(one.difference), "n"),
            TableCell(_p(one.difference), "n"),
            *(TableCell(number(value), kind) for value, kind in zip(values, kinds, strict=True)),
            TableCell(tokens(cost.tokens), "n"),
            TableCell(duration(cost.seconds), "n"),
            TableCell(memory(cost.peak_memory_mib), "n"),
        ]
        text = f"{one.rank}. {one.run.name}" if one.rank else one.run.name
        rows.append([TableCell(text, color=one.color), *cells])
    test = f"Δ, p: paired bootstrap against {baseline} over rows, p after Holm's correction, * p < {SIGNIFICANT}"
    note = f"{_counts(table)}; {test}"
    return Table(_heads("run", *heads, "tokens", "time", "memory", kind="n"), rows, f"Ranking on {name}", note)


def _counts(table: Sequence[Standing]) -> str:
    """Rows and sampling seeds of the methods, which need not be the same for all."""
    scores = [one.scored.scores for one in table if one.rank]
    rows = sorted({one.get("rows", 0) for one in scores})
    seeds = sorted({len(one.get("seeds", [])) for one in scores})
    return f"{_range(rows)} rows, {_range(seeds)} sampling seed{'s' if seeds[-1] != 1 else ''}"


def _range(counts: Sequence[int]) -> str:
    return f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"


def _best(values: Sequence[float | None]) -> float | None:
    return min((value for value in values if value is not None), default=None)


def _interval(ends: tuple[float, float] | None) -> str:
    return "–" if ends is None else f"[{number(ends[0])}, {number(ends[1])}]"


def _difference(found: Difference | None) -> str:
    return "–" if found is None else f"{'+' if found.mean >= 0 else ''}{number(found.mean)}"


def _p(found: Difference | None) -> str:
    if found is None or found.corrected is None:
        return "–"
    return f"{p_text(found.corrected).removeprefix('= ')}{'*' if found.corrected < SIGNIFICANT else ''}"


def budgets(table: Sequence[Standing], name: str) -> list[Block]:
    """The best method within each budget of tokens and of seconds: each row is better than all that cost less."""
    blocks: list[Block] = []
    for what, costs, written in (
        ("tokens", [one.run.cost.tokens for one in table], tokens),
        ("seconds", [one.run.cost.seconds for one in table], duration),
    ):
        known = [(one, cost) for one, cost in zip(table, costs, strict=True) if one.rank and cost is not None]
        best = front([cost for _, cost in known], [one.mean for one, _ in known])
        rows = [
            [TableCell(known[i][0].run.name, color=known[i][0].color), TableCell(written(known[i][1]), "n"),
             TableCell(number(known[i][0].mean), "n")]
            for i in best
        ]  # fmt: skip
        if rows:
            heads = _heads("best method", f"from {what}", "Rouge-L", kind="n")
            blocks.append(Table(heads, rows, f"Within a budget of {what}", f"on {name}"))
    return blocks


def by_length(experiment: Experiment, name: str) -> list[Block]:
    """Rouge-L by length of the reference."""
    runs = [run for run in experiment.scored if name in run.evaluations]
    labels = dict.fromkeys(
        (bucket["label"], bucket["rows"])
        for run in runs
        for bucket in run.evaluations[name].scores.get("lengths", {}).get("buckets", [])
    )
    if not labels:
        return []
    colors = colors_by_name(experiment)
    rows = []
    for run in runs:
        lengths = run.evaluations[name].scores.get("lengths", {})
        found = {bucket["label"]: bucket["metrics"].get(RANKED_BY, {}) for bucket in lengths.get("buckets", [])}
        cells = [TableCell(number(finite(found.get(label, {}).get("mean"))), "n") for label, _ in labels]
        rows.append([TableCell(run.name, color=colors.get(run.name)), *cells])
    unit = runs[0].evaluations[name].scores.get("lengths", {}).get("unit", "words")
    heads = _heads("run", *(f"{label} {unit} ({count:,} rows)" for label, count in labels), kind="n")
    return [Folded(f"Rouge-L on {name} by length of the reference", [Table(heads, rows)])]


def colors_by_name(experiment: Experiment) -> dict[str, int]:
    """Of the methods."""
    return {run.name: color for color, run in enumerate(experiment.methods)}


def more_metrics(experiment: Experiment, name: str) -> list[Block]:
    """All that the ranking does not show, a row for each run."""
    runs = [run for run in experiment.scored if name in run.evaluations]
    names = ordered(metric for run in runs for metric in run.evaluations[name].metrics)
    rest = [metric for metric in names if metric not in (RANKED_BY, *_BESIDE)]
    return (
        [Folded(f"{len(rest)} more metrics on {name}", [_metrics(experiment, [(name, m) for m in rest])])]
        if rest
        else []
    )


def _metrics(experiment: Experiment, wanted: Sequence[tuple[str, str]], *, sets: bool = False) -> Table:
    """Runs by metrics of sets; the best method of a column is bold where a direction is better."""
    colors = colors_by_name(experiment)
    columns, heads = [], []
    for name, metric in wanted:
        scored = [run.evaluations[name] for run in experiment.scored if name in run.evaluations]
        values = {run.name: score_of(run, name, metric) for run in experiment.methods}
        known = [value for value in values.values() if value is not None]
        better = better_of(metric, scored)
        pick = {"higher": max, "lower": min}.get(better)
        columns.append((name, metric, pick(known) if pick and len(set(known)) > 1 else None))
        heads.append(f"{name}: {title_of(metric, scored)}" if sets else title_of(metric, scored))
    rows = []
    for run in experiment.scored:
        cells = [TableCell(run.name, color=colors.get(run.name))]
        for name, metric, best in columns:
            mean, error = _with_error(run.evaluations.get(name), metric)
            is_best = best is not None and mean == best and run.name in colors
            cells.append(TableCell(spread(mean, error), "n best" if is_best else "n"))
        rows.append(cells)
    return Table(_heads("run", *heads, kind="n"), rows)


def _with_error(one: Scored | None, metric: str) -> tuple[float | None, float | None]:
    """The mean with its standard deviation over seeds, or its standard error over rows, as benchmarks have it."""
    if one is None:
        return None, None
    found = one.metrics.get(metric, {})
    sd = finite(found.get("sd"))
    return finite(found.get("mean")), finite(one.scores.get("stderr", {}).get(metric)) if sd is None else sd


def other_sets(experiment: Experiment) -> list[Block]:
    """Standard benchmarks: the sets without Rouge-L, side by side, by the metrics that have a direction."""
    wanted = []
    for name in sets_of(experiment, ranked=False):
        scored = [run.evaluations[name] for run in experiment.scored if name in run.evaluations]
        names = ordered(metric for one in scored for metric in one.metrics)
        wanted += [(name, metric) for metric in [m for m in names if better_of(m, scored)] or names]
    return [_metrics(experiment, wanted, sets=True)] if wanted else []


def collapse(experiment: Experiment) -> list[Block]:
    """A row for each method with pairs: means over its runs at the first and last logged step, and which collapsed."""
    rows = []
    for color, method in enumerate(experiment.methods):
        runs = [run for run in members(method) if has_pairs(run)]
        if not runs:
            continue
        logps = [[logp for row in run.metrics if (logp := logps_per_token(row)) is not None] for run in runs]
        margins = [[m for row in run.metrics if (m := finite(row.get("reward/margin"))) is not None] for run in runs]
        verdict, kind = _verdict([collapse_step(run.metrics) for run in runs])
        rows.append(
            [
                TableCell(method.name, color=color),
                TableCell(_from_to([[chosen for chosen, _ in own] for own in logps]), "n"),
                TableCell(_from_to([[rejected for _, rejected in own] for own in logps]), "n"),
                TableCell(_from_to(margins), "n"),
                TableCell(verdict, kind),
            ]
        )
    if not rows:
        return []
    heads = ["log q(y_w) per token", "log q(y_l) per token", "reward margin"]
    return [Table([*_heads("run", *heads, kind="n"), TableCell("")], rows, "", "")]


def _verdict(steps: Sequence[int | None]) -> tuple[str, str]:
    """What the detector says of the runs of a method, and the kind of the cell.

    >>> _verdict([None]), _verdict([70, None])
    (('held', 'dim'), ('1 of 2 collapsed, at step 70', 'bad'))
    """
    found = [step for step in steps if step is not None]
    if not found:
        return "held", "dim"
    count = f"{len(found)} of {len(steps)} " if len(steps) > 1 else ""
    return f"{count}collapsed, at step {min(found):,}", "bad"


def _from_to(series: Sequence[Sequence[float]]) -> str:
    """Mean over runs at the first and at the last logged step."""
    known = [values for one in series if (values := [value for v in one if (value := finite(v)) is not None])]
    if not known:
        return "–"
    return f"{number(fmean(own[0] for own in known))} → {number(fmean(own[-1] for own in known))}"


def correlation_table(table: Sequence[Standing], name: str) -> list[Block]:
    """Pearson and Spearman correlation of scores with Rouge-L over the models of a set."""
    rows = [
        [
            TableCell(what),
            TableCell(number(found.pearson), "n"),
            TableCell(_interval((found.low, found.high)), "n dim"),
            TableCell(number(found.spearman), "n"),
            TableCell(str(found.count), "n"),
        ]
        for what, found in correlations(table, name)
    ]
    heads = _heads("score", "Pearson r", "95 %", "Spearman ρ", "models", kind="n")
    note = "over the models, the start among them; interval: Fisher's"
    return [Table(heads, rows, f"Correlation with Rouge-L on {name}", note)] if rows else []


def chosen(experiment: Experiment) -> list[Block]:
    """What each stage chose on dev rows, from which values; the chosen one is bold."""
    blocks: list[Block] = []
    for stage, choice in experiment.choices.items():
        paths, values = list(choice.get("chosen", {})), choice.get("values", {})
        metric = choice.get("metric", "")
        rows = []
        for name, value in values.items():
            run = experiment.tried.get(name)
            own = flat(run.config) if run is not None else {}
            kind = "n best" if name == choice.get("run") else "n"
            cells = [TableCell(public(own.get(path, "–")), kind) for path in paths]
            rows.append([TableCell(name), *cells, TableCell(number(value), kind)])
        note = "at the edge of the grid: a wider grid may have a better value" if _at_edge(experiment, choice) else ""
        heads = _heads(stage, *paths, f"dev {title(metric)}", kind="n")
        blocks.append(
            Table(heads, rows, ", ".join(f"{p} = {public(v)}" for p, v in choice.get("chosen", {}).items()), note)
        )
    return [Group("grid broad", blocks)] if blocks else []


def _at_edge(experiment: Experiment, choice: StageChoice) -> bool:
    """Whether the one setting that was chosen is the smallest or the largest number of its grid."""
    if len(choice.get("chosen", {})) != 1:
        return False
    ((path, value),) = choice["chosen"].items()
    tried = [flat(experiment.tried[name].config).get(path) for name in choice["values"] if name in experiment.tried]
    grid = {number for one in tried if (number := finite(one)) is not None}
    return len(grid) > 1 and finite(value) in (min(grid), max(grid))


def differing_settings(experiment: Experiment) -> list[Block]:
    """A row for each method, a column for each setting in which they differ."""
    configs = [{path: public(value) for path, value in flat(run.config).items()} for run in experiment.methods]
    paths = list(dict.fromkeys(path for own in configs for path in own))
    own_paths = [p for p in paths if p not in ("output", "seed") and len({c.get(p, "–") for c in configs}) > 1]
    if not own_paths:
        return []
    rows = [
        [TableCell(run.name, color=color), *(TableCell(own.get(path, "–")) for path in own_paths)]
        for color, (run, own) in enumerate(zip(experiment.methods, configs, strict=True))
    ]
    return [Table(_heads("run", *own_paths), rows, "Where the methods differ")]


def legend(experiment: Experiment) -> list[Key]:
    """The methods with their colors."""
    return [Key(color, name, "") for name, color in colors_by_name(experiment).items()]


def about_tokens(table: Sequence[Standing]) -> Note | None:
    """Whether the methods were trained on as many tokens."""
    counts = [c for one in table if one.rank and (c := one.run.cost.tokens) is not None]
    if len(counts) < 2 or not min(counts):
        return None
    least, most = tokens(min(counts)), tokens(max(counts))
    told = f"The methods trained on {least if least == most else f'{least} to {most}'} response tokens"
    return Note(
        f"{told}: the ranking is one at equal tokens, within 10\u00a0%."
        if max(counts) <= 1.1 * min(counts)
        else f"{told}: for equal tokens, see the best within a budget."
    )
