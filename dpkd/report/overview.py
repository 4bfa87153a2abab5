"""The head of a report: what the runs are, their most telling numbers, and what they cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dpkd.report.markup import Markup, element
from dpkd.report.names import number, public, spread, title
from dpkd.report.reading import Cost, Run
from dpkd.report.scales import finite, label


def subtitle(runs: Sequence[Run]) -> str:
    """One line: teacher, student, data, steps of a run; what several have in common."""
    told = [facts_of(run) for run in runs]
    common = {key: value for key, value in told[0].items() if value and all(own.get(key) == value for own in told)}
    order = ("teacher", "student", "data", "steps")
    return " · ".join(
        f"{key} {common[key]}" if key != "steps" else f"{common[key]} steps" for key in order if key in common
    )


def facts_of(run: Run) -> dict[str, str]:
    """What a run is, in words; empty texts for what is not known."""
    config, facts = run.config, run.facts
    sizes: Mapping[str, Any] = facts.get("parameters", {})
    return {
        "loss": run.loss or "",
        "teacher": _sized(_model(config.get("teacher")), sizes.get("teacher")),
        "student": _sized(_student(config.get("student")), sizes.get("student")),
        "data": public(config["data"]["path"]) if config.get("data", {}).get("path") else "",
        "steps": f"{facts['steps']:,}" if "steps" in facts else "",
        "seed": str(config["seed"]) if "seed" in config else "",
    }


def _model(block: Any) -> str:
    name = block.get("model") if isinstance(block, Mapping) else None
    return public(name) if name else ""


def _student(block: Any) -> str:
    if not isinstance(block, Mapping):
        return ""
    if block.get("model"):
        return public(block["model"])
    if block.get("init") == "layers":
        return f"{block.get('layers')} layers of the teacher"
    return f"{block['init']} of the teacher" if block.get("init") else ""


def _sized(name: str, parameters: object) -> str:
    size = finite(parameters)
    return f"{name} ({label(float(f'{size:.3g}')).replace('k', 'K')})" if name and size else name


def duration(seconds: float | None) -> str:
    """A time for people.

    >>> duration(4.21), duration(184), duration(7384), duration(None)
    ('4.2 s', '3 min 4 s', '2 h 3 min', '–')
    """
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def memory(mib: float | None) -> str:
    """Memory for people.

    >>> memory(544.2), memory(9216.0), memory(None)
    ('544 MiB', '9.0 GiB', '–')
    """
    if mib is None:
        return "–"
    return f"{mib:.0f} MiB" if mib < 1024 else f"{mib / 1024:.1f} GiB"


def tokens(count: float | None) -> str:
    """A number of tokens, in three digits.

    >>> tokens(163840.0), tokens(None)
    ('164k', '–')
    """
    return "–" if count is None else label(float(f"{count:.3g}"))


def run_name(run: Run, colour: int) -> Markup:
    """The name of a run beside its colour."""
    return element("span", element("i", class_=f"c{colour % 8}"), run.name, class_="run")


def overview(runs: Sequence[Run]) -> Markup | None:
    """Tiles for one run, a table for several."""
    if len(runs) > 1:
        return _runs_table(runs)
    tiles = _tiles(runs[0])
    shown = [
        element(
            "div",
            element("b", value, element("small", f" {extra}") if extra else None),
            element("span", what),
            class_="tile",
        )
        for what, value, extra in tiles
    ]
    return element("div", *shown, class_="tiles") if shown else None


def _tiles(run: Run) -> list[tuple[str, str, str]]:
    """What, value, and what stands small behind it."""
    tiles = []
    for name, scored in run.evaluations.items():
        for metric in ("rouge_l", "exact_match", "nll"):
            found = scored.metrics.get(metric)
            if found is not None and not (metric == "exact_match" and found["mean"] == 0):
                sd = finite(found.get("sd"))
                tiles.append((f"{title(metric)} on {name}", *_apart(spread(found["mean"], sd))))
    last = run.metrics[-1] if run.metrics else {}
    for key, what in (
        ("kl/forward", "forward KL at the end"),
        ("kl/reverse", "reverse KL at the end"),
        ("reward/margin", "reward margin at the end"),
        ("reward/accuracy", "preference accuracy at the end"),
    ):
        if (value := finite(last.get(key))) is not None:
            tiles.append((what, number(value), ""))
    cost = run.cost
    if cost != Cost():
        tiles += [
            ("training time", duration(cost.seconds), ""),
            ("response tokens trained on", tokens(cost.tokens), ""),
            ("peak memory", memory(cost.peak_memory_mib), ""),
        ]
    return tiles


def _apart(text: str) -> tuple[str, str]:
    """`24.62 ± 0.31` as `24.62` and `± 0.31`."""
    mean, sign, sd = text.partition(" ± ")
    return mean, f"± {sd}" if sign else ""


def _runs_table(runs: Sequence[Run]) -> Markup:
    told = [facts_of(run) for run in runs]
    keys = [key for key in ("loss", "teacher", "student", "data", "steps", "seed") if any(own[key] for own in told)]
    numeric = ("steps", "seed")
    rows = [
        [
            run_name(run, i),
            *(own[key] or "–" for key in keys),
            duration(run.cost.seconds),
            tokens(run.cost.tokens),
            memory(run.cost.peak_memory_mib),
        ]
        for i, (run, own) in enumerate(zip(runs, told, strict=True))
    ]
    heads = ["run", *keys, "time", "tokens", "peak memory"]
    right = {i for i, head in enumerate(heads) if head in (*numeric, "time", "tokens", "peak memory")}
    return table(heads, rows, right=right)


def table(
    heads: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    right: set[int] | frozenset[int] = frozenset(),
    caption: Markup | None = None,
    best: set[tuple[int, int]] | frozenset[tuple[int, int]] = frozenset(),
    class_: str | None = None,
) -> Markup:
    """A table that scrolls sideways in its own frame; `best` marks cells by row and column."""

    def cell(row: int, column: int, content: str) -> Markup:
        kinds = (["n"] if column in right else []) + (["best"] if (row, column) in best else [])
        name = "th" if column == 0 else "td"
        return element(name, content, class_=" ".join(kinds) or None, scope="row" if column == 0 else None)

    head = element(
        "tr", *(element("th", h, class_="n" if i in right else None, scope="col") for i, h in enumerate(heads))
    )
    body = [element("tr", *(cell(r, c, content) for c, content in enumerate(row))) for r, row in enumerate(rows)]
    inner = element("table", caption, element("thead", head), element("tbody", *body), class_=class_)
    return element("div", inner, class_="scroll", tabindex="0")
