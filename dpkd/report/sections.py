"""Overview, scores, settings, data and versions of runs, as blocks of the page."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dpkd.report.blocks import Block, FactList, Folded, Group, Table, TableCell, Tile
from dpkd.report.names import compact, duration, finite, memory, number, ordered, public, spread, tokens
from dpkd.report.reading import Cost, MetricValues, Run, Scored, better_of, title_of
from dpkd.run_folder import RunFolder
from dpkd.settings import flat

_SOURCE = re.compile(r"^- \[(?P<title>.+)\]\((?P<url>https?://[^)\s]+)\)(?P<where>.*)$")
_TOLD = ("loss", "teacher", "student", "data", "steps", "seed")
_NUMERIC = ("steps", "seed", "time", "tokens", "peak memory")


def facts_of(run: Run) -> dict[str, str]:
    """What a run is, in words; empty texts for what is not known."""
    config, sizes = run.config, run.facts.get("parameters", {})
    steps = run.facts.get("steps")
    return {
        "loss": run.loss or "",
        "teacher": _sized(_model(config.get("teacher")), sizes.get("teacher")),
        "student": _sized(_student(config.get("student")), sizes.get("student")),
        "data": public(path) if (path := config.get("data", {}).get("path")) else "",
        "steps": f"{steps:,}" if steps is not None else "",
        "seed": str(config.get("seed", "")),
    }


def _model(block: Mapping[str, Any] | None) -> str:
    """A model's name; that of its run where it is the model of one."""
    if not block or not block.get("model"):
        return ""
    path = Path(str(block["model"]))
    return path.parent.name if path.name == "model" and path.parent.name else public(block["model"])


def _student(block: Mapping[str, Any] | None) -> str:
    if not block or block.get("model"):
        return _model(block)
    if block.get("init") == "layers":
        return f"{block.get('layers')} layers of the teacher"
    return f"{block['init']} of the teacher" if block.get("init") else ""


def _sized(name: str, parameters: object) -> str:
    size = finite(parameters)
    return f"{name} ({compact(float(f'{size:.3g}')).replace('k', 'K')})" if name and size else name


def subtitle(runs: Sequence[Run]) -> str:
    """One line: teacher, student, data, steps of a run; what several have in common."""
    told = [facts_of(run) for run in runs]
    common = {key: value for key, value in told[0].items() if value and all(own.get(key) == value for own in told)}
    parts = {"teacher": "teacher {}", "student": "student {}", "data": "data {}", "steps": "{} steps"}
    return " · ".join(form.format(common[key]) for key, form in parts.items() if key in common)


def overview(runs: Sequence[Run]) -> list[Block]:
    """Tiles for one run, a table for several."""
    if len(runs) == 1:
        tiles = _tiles(runs[0])
        return [Group("tiles", tiles)] if tiles else []
    told = [facts_of(run) for run in runs]
    keys = [key for key in _TOLD if any(own[key] for own in told)]
    heads = ["run", *keys, "time", "tokens", "peak memory"]
    kinds = ["n" if head in _NUMERIC else "" for head in heads]
    rows = []
    for color, (run, own) in enumerate(zip(runs, told, strict=True)):
        cost = (duration(run.cost.seconds), tokens(run.cost.tokens), memory(run.cost.peak_memory_mib))
        texts = [*(own[key] or "–" for key in keys), *cost]
        rows.append([TableCell(run.name, color=color), *map(TableCell, texts, kinds[1:])])
    return [Table([TableCell(head, kind) for head, kind in zip(heads, kinds, strict=True)], rows)]


def _tiles(run: Run) -> list[Tile]:
    tiles = []
    for name, scored in run.evaluations.items():
        for metric in scored.shown(("rouge_l", "exact_match", "nll")):
            found = scored.metrics.get(metric, {})
            mean = finite(found.get("mean"))
            if mean is not None and not (metric == "exact_match" and mean == 0):
                value, sign, sd = spread(mean, finite(found.get("sd"))).partition(" ± ")
                tiles.append(Tile(f"{title_of(metric, [scored])} on {name}", value, f"± {sd}" if sign else ""))
    last = run.metrics[-1] if run.metrics else {}
    ends = {
        "kl/forward": "forward KL at the end",
        "kl/reverse": "reverse KL at the end",
        "reward/margin": "reward margin at the end",
        "reward/accuracy": "preference accuracy at the end",
    }
    tiles += [Tile(what, number(end)) for key, what in ends.items() if (end := finite(last.get(key))) is not None]
    return tiles + [Tile(what, value) for what, value in _cost(run.cost)]


def _cost(cost: Cost) -> list[tuple[str, str]]:
    if cost == Cost():
        return []
    return [
        ("training time", duration(cost.seconds)),
        ("response tokens trained on", tokens(cost.tokens)),
        ("peak memory", memory(cost.peak_memory_mib)),
    ]


def scores(runs: Sequence[Run]) -> list[Block]:
    """A table for each set: metrics by runs; those without a preferred direction are folded away."""
    blocks: list[Block] = []
    for name in dict.fromkeys(name for run in runs for name in run.evaluations):
        scored = [run.evaluations.get(name) for run in runs]
        known = [one for one in scored if one is not None]
        metrics = ordered(metric for one in known for metric in one.metrics)
        first = [metric for metric in metrics if better_of(metric, known)] or metrics
        rest = [metric for metric in metrics if metric not in first]
        blocks.append(_scores_of(first, scored, runs, name, "; ".join(dict.fromkeys(map(_scored_how, known)))))
        if rest:
            blocks.append(Folded(f"{len(rest)} more metrics on {name}", [_scores_of(rest, scored, runs)]))
    return blocks


def _scores_of(
    metrics: Sequence[str], scored: Sequence[Scored | None], runs: Sequence[Run], caption: str = "", note: str = ""
) -> Table:
    known = [one for one in scored if one is not None]
    rows = []
    for metric in metrics:
        found = [one.metrics.get(metric) if one is not None else None for one in scored]
        best = _best(better_of(metric, known), found)
        cells = [TableCell(_spread(values), "n best" if i in best else "n") for i, values in enumerate(found)]
        unit = next((unit for one in known if (unit := one.scores.get("units", {}).get(metric))), "")
        rows.append(
            [TableCell(title_of(metric, known)), *cells, TableCell(unit, "dim unit" if len(runs) > 1 else "dim")]
        )
    names = [run.name for run in runs] if len(runs) > 1 else ["value"]
    return Table([TableCell("metric"), *(TableCell(name, "n") for name in names), TableCell("")], rows, caption, note)


def _spread(values: MetricValues | None) -> str:
    return "–" if values is None else spread(finite(values.get("mean")), finite(values.get("sd")))


def _best(better: str, found: Sequence[MetricValues | None]) -> list[int]:
    """The columns of the best values, where there is something to choose between."""
    means = {i: mean for i, m in enumerate(found) if m is not None and (mean := finite(m.get("mean"))) is not None}
    if len(means) < 2 or not better or len(set(means.values())) == 1:
        return []
    top = max(means.values()) if better == "higher" else min(means.values())
    return [i for i, value in means.items() if value == top]


def _scored_how(one: Scored) -> str:
    """Rows, seeds and generation."""
    found, made = one.scores, one.scores.get("generation", {})
    limit = f", at most {made['max_new_tokens']} tokens" if "max_new_tokens" in made else ""
    if found.get("greedy"):
        return f"{found.get('rows', 0):,} rows, greedy{limit}"
    seeds = ", ".join(map(str, found.get("seeds", [])))
    drawn = f"T = {made.get('temperature', '?')}, top-p {made.get('top_p', '?')}"
    return f"{found.get('rows', 0):,} rows, seeds {seeds}, {drawn}{limit}"


def settings(runs: Sequence[Run]) -> list[Block]:
    """What differs between several runs, what was chosen for one, and all settings folded away."""
    trained = [run for run in runs if run.config]
    if not trained:
        return []
    all_settings = [{path: public(value) for path, value in flat(run.config).items()} for run in trained]
    paths = list(dict.fromkeys(path for own in all_settings for path in own))
    rows = [[path, *(own.get(path, "–") for own in all_settings)] for path in paths]
    heads = ["setting", *([run.name for run in trained] if len(trained) > 1 else ["value"])]
    every = Folded(f"All {len(rows)} settings", [_mono(heads, rows)])
    if len(trained) > 1:
        differing = [row for row in rows if len(set(row[1:])) > 1 and row[0] != "output"]
        return [*([_mono(heads, differing, "Where the runs differ")] if differing else []), every]
    sources = trained[0].sources
    chosen = [[path, all_settings[0][path], sources[path]] for path in paths if path in sources]
    return [*([_mono(["chosen", "value", "by"], chosen)] if chosen else []), every]


def _mono(heads: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> Table:
    cells = [[TableCell(text, "mono") for text in row] for row in rows]
    return Table([TableCell(head) for head in heads], cells, caption, wide=True)


def technical(runs: Sequence[Run]) -> list[Block]:
    """Data, cost, versions and command of each run, and the papers behind its loss."""
    cards = [_technical(run, run.name if len(runs) > 1 else "") for run in runs if run.facts]
    return [Group("grid broad", cards)] if cards else []


def _technical(run: Run, name: str) -> FactList:
    facts = run.facts
    data, machine = facts.get("data", {}), facts.get("machine", {})
    left_out = {**data.get("skipped", {}), **data.get("dropped", {})}
    versions = {"dpkd": facts.get("dpkd", "?"), **facts.get("versions", {})}
    lines = [
        ("data", public(data["path"]) if "path" in data else ""),
        ("examples", f"{data['kept']:,} kept of {data['examples']:,}" if "kept" in data and "examples" in data else ""),
        ("left out", "; ".join(f"{n:,} {why}" for why, n in left_out.items())),
        ("response tokens", number(finite(data.get("response_tokens"))) if "response_tokens" in data else ""),
        ("fingerprint", str(data.get("fingerprint", ""))[:16]),
        *_cost(run.cost),
        ("machine", f"{machine.get('platform', '')}, {machine.get('threads', '?')} threads" if machine else ""),
        ("versions", ", ".join(f"{package} {version}" for package, version in versions.items())),
        ("command", " ".join(map(public, facts.get("command", [])))),
    ]
    return FactList(name, [(what, value) for what, value in lines if value.strip()], _papers(run))


def _papers(run: Run) -> list[tuple[str, str, str]]:
    """The papers that the run's model card names."""
    card = RunFolder(run.path).card
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    _, _, section = text.partition("\n## Sources\n")
    found = [match for line in section.splitlines() if (match := _SOURCE.match(line))]
    return [(_unescaped(m["title"]), m["url"], _unescaped(m["where"])) for m in found]


def _unescaped(markdown: str) -> str:
    """The text that a card's escapes stand for."""
    from html import unescape

    return unescape(re.sub(r"\\([\\`*_{}\[\]()#+!|<>~-])", r"\1", markdown))
