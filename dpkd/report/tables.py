"""Scores, settings, data and versions as tables of a page."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dpkd.report.markup import Markup, element, joined
from dpkd.report.names import number, ordered, public, spread, title
from dpkd.report.overview import duration, memory, table, tokens
from dpkd.report.reading import Cost, Run, Scored, better_of
from dpkd.report.scales import finite

_SOURCE = re.compile(r"^- \[(?P<title>.+)\]\((?P<url>https?://[^)\s]+)\)(?P<where>.*)$")


def scores_tables(runs: Sequence[Run]) -> list[Markup]:
    """One table for each set: metrics by runs."""
    names = dict.fromkeys(name for run in runs for name in run.evaluations)
    return [_scores(name, runs) for name in names]


def _scores(name: str, runs: Sequence[Run]) -> Markup:
    scored = [run.evaluations.get(name) for run in runs]
    known = [one for one in scored if one is not None]
    metrics = ordered(metric for one in known for metric in one.metrics)
    first = [metric for metric in metrics if better_of(metric, known)] or metrics
    rest = [metric for metric in metrics if metric not in first]
    how = element("caption", f"{name} ", element("span", _scored_how(known)))
    more = _folded(f"{len(rest)} more metrics on {name}", _scores_of(rest, scored, runs)) if rest else None
    return joined(_scores_of(first, scored, runs, how), more)


def _scores_of(
    metrics: Sequence[str], scored: Sequence[Scored | None], runs: Sequence[Run], caption: Markup | None = None
) -> Markup:
    known = [one for one in scored if one is not None]
    rows, best = [], set()
    for index, metric in enumerate(metrics):
        found = [one.metrics.get(metric) if one is not None else None for one in scored]
        cells = [spread(m["mean"], finite(m.get("sd"))) if m is not None else "–" for m in found]
        unit = next((unit for one in known if (unit := one.scores.get("units", {}).get(metric))), "")
        rows.append([title(metric), *cells, element("span", unit, class_="dim unit" if len(runs) > 1 else "dim")])
        best |= {(index, column + 1) for column in _best(better_of(metric, known), found)}
    heads = ["metric", *([run.name for run in runs] if len(runs) > 1 else ["value"]), ""]
    return table(heads, rows, right=set(range(1, len(runs) + 1)), caption=caption, best=best)


def _best(better: str, found: Sequence[Mapping[str, Any] | None]) -> list[int]:
    """The columns of the best values, where there is something to choose between."""
    means = {i: m["mean"] for i, m in enumerate(found) if m is not None and finite(m["mean"]) is not None}
    if len(means) < 2 or not better or len(set(means.values())) == 1:
        return []
    top = max(means.values()) if better == "higher" else min(means.values())
    return [i for i, value in means.items() if value == top]


def _scored_how(scored: Sequence[Scored]) -> str:
    """Rows, seeds and generation, for each way that differs."""
    ways = []
    for one in scored:
        scores, made = one.scores, one.scores.get("generation", {})
        seeds = "greedy" if scores.get("greedy") else f"seeds {', '.join(map(str, scores.get('seeds', [])))}"
        drawn = "" if scores.get("greedy") else f", T = {made.get('temperature', '?')}, top-p {made.get('top_p', '?')}"
        limit = f", at most {made['max_new_tokens']} tokens" if "max_new_tokens" in made else ""
        ways.append(f"{scores.get('rows', 0):,} rows, {seeds}{drawn}{limit}")
    return "; ".join(dict.fromkeys(ways))


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Settings by dotted path.

    >>> list(flat({"train": {"lr": 0.1, "betas": [1, 2]}, "seed": 3}))
    [('train.lr', 0.1), ('train.betas', [1, 2]), ('seed', 3)]
    """
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def settings_section(runs: Sequence[Run]) -> Markup | None:
    """What differs between several runs, what was chosen for one, and all settings folded away."""
    trained = [run for run in runs if run.config]
    if not trained:
        return None
    settings = [dict(flat(run.config)) for run in trained]
    paths = list(dict.fromkeys(path for own in settings for path in own))
    if len(trained) == 1:
        run, own = trained[0], settings[0]
        chosen = [[path, _value(own[path]), run.sources[path]] for path in paths if path in run.sources]
        first = table(["chosen", "value", "by"], [_row(r) for r in chosen], class_="wide") if chosen else None
        rest = [_row([path, _value(own[path])]) for path in paths]
        return joined(first, _folded(f"All {len(rest)} settings", table(["setting", "value"], rest, class_="wide")))
    heads = ["setting", *(run.name for run in trained)]
    rows = [[path, *(_value(own[path]) if path in own else "–" for own in settings)] for path in paths]
    differing = [_row(row) for row in rows if len(set(row[1:])) > 1 and row[0] != "output"]
    shown = table(heads, differing, caption=element("caption", "Where the runs differ"), class_="wide")
    every = table(heads, [_row(row) for row in rows], class_="wide")
    return joined(shown if differing else None, _folded(f"All {len(rows)} settings", every))


def _row(cells: Sequence[str]) -> list[Markup]:
    return [element("code", cells[0]), *(element("span", cell, class_="mono") for cell in cells[1:])]


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return ", ".join(map(public, value)) or "[]" if isinstance(value, list) else public(value)


def _folded(name: str, content: Markup) -> Markup:
    return element("details", element("summary", name), content)


def technical_section(runs: Sequence[Run]) -> Markup | None:
    """Data, cost, versions and command of each run, and the papers behind its loss."""
    cards = [card for run in runs if (card := _technical(run, len(runs) > 1)) is not None]
    return element("div", *cards, class_="grid broad") if cards else None


def _technical(run: Run, named: bool) -> Markup | None:
    facts = run.facts
    if not facts:
        return None
    data, machine = facts.get("data", {}), facts.get("machine", {})
    left_out = {**data.get("skipped", {}), **data.get("dropped", {})}
    versions = {"dpkd": facts.get("dpkd", "?"), **facts.get("versions", {})}
    lines = [
        ("data", public(data["path"]) if "path" in data else ""),
        ("examples", f"{data['kept']:,} kept of {data['examples']:,}" if "kept" in data and "examples" in data else ""),
        ("left out", "; ".join(f"{n:,} {why}" for why, n in left_out.items())),
        ("response tokens", number(finite(data.get("response_tokens"))) if "response_tokens" in data else ""),
        ("fingerprint", str(data.get("fingerprint", ""))[:16]),
        *_cost_lines(run.cost),
        ("machine", f"{machine.get('platform', '')}, {machine.get('threads', '?')} threads" if machine else ""),
        ("versions", ", ".join(f"{name} {v}" for name, v in versions.items())),
        ("command", " ".join(public(part) for part in facts.get("command", []))),
    ]
    rows = [
        element("tr", element("th", what, scope="row"), element("td", value)) for what, value in lines if value.strip()
    ]
    heading = element("h3", run.name) if named else None
    body = element("table", element("tbody", *rows), class_="wide facts")
    return element("div", heading, body, _sources(run), class_="card")


def _cost_lines(cost: Cost) -> list[tuple[str, str]]:
    if cost == Cost():
        return []
    return [
        ("training time", duration(cost.seconds)),
        ("tokens trained on", tokens(cost.tokens)),
        ("peak memory", memory(cost.peak_memory_mib)),
    ]


def _sources(run: Run) -> Markup | None:
    """The papers that the run's model card names."""
    card = Path(run.path) / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    _, _, section = text.partition("\n## Sources\n")
    found = [match for line in section.splitlines() if (match := _SOURCE.match(line))]
    links = [
        element("li", element("a", m["title"], href=m["url"], rel="noopener noreferrer"), m["where"]) for m in found
    ]
    return element("ul", *links, class_="dim") if links else None
