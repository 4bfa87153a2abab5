"""What the models wrote: samples side by side, and answers with every token shaded by its reward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from dpkd.evaluation.predictions import TEACHER
from dpkd.report.blocks import Block, Column, Folded, Sample, Shades, Token
from dpkd.report.names import finite, number
from dpkd.report.reading import PredictionRow, Run, Scored, TokenRewards

PER_SET = 3  # rows of each evaluated set
DURING = 2  # prompts of the first and of the last logged step
STRONGEST = 72  # per cent of color at the strongest reward


def samples(runs: Sequence[Run]) -> list[Block]:
    """Answers to evaluated rows, then the responses that the runs trained on."""
    cards: list[Block] = [*answers(runs)]
    trained = [card for run in runs for card in _trained(run, named=len(runs) > 1)]
    if trained:
        cards.append(
            Folded("Text that was trained on, at the first and at the last logged step", trained, is_open=not cards)
        )
    return cards


def answers(
    runs: Sequence[Run],
    colors: Mapping[str, int] | None = None,
    *,
    sets: Sequence[str] | None = None,
    first: int | None = None,
) -> list[Sample]:
    """Answers to the first rows of each set (None: of all), side by side.

    Those of the `first` runs are seen at once (None: all).
    """
    names = sets if sets is not None else dict.fromkeys(name for run in runs for name in run.evaluations)
    cards = [card for name in names for card in _evaluated(name, runs, colors or {})]
    if first is None:
        return cards
    shown = {run.name for run in runs[:first]}
    own = {run.name for run in runs}
    return [
        replace(
            card,
            columns=[column for column in card.columns if column.who in shown or column.who not in own],
            more=[column for column in card.columns if column.who in own - shown],
        )
        for card in cards
    ]


def _evaluated(name: str, runs: Sequence[Run], colors: Mapping[str, int]) -> list[Sample]:
    """The first rows of a set: reference, teacher, and the answer of each run under its first seed."""
    scored = {run.name: run.evaluations[name] for run in runs if name in run.evaluations}
    found = {run: _first_seed(one) for run, one in scored.items()}
    teachers = next((rows for one in scored.values() if (rows := _first_seed(teacher_of(one)))), {})
    first = next((rows for rows in found.values() if rows), {})
    cards = []
    for key, row in list(first.items())[:PER_SET]:
        columns = [Column("reference", "", " / ".join(row.get("references", [])))]
        if key in teachers and "teacher" not in found:
            columns.append(Column("teacher", "", _field(teachers[key], "prediction")))
        for run, rows in found.items():
            if key in rows:
                who = "student" if len(runs) == 1 else run
                shown = _field(rows[key], "prediction")
                columns.append(Column(who, _told(rows[key]), shown, color=colors.get(run)))
        cards.append(Sample(f"{name} · {key}", _field(row, "prompt"), columns))
    return cards


def _field(row: PredictionRow, name: str) -> str:
    return str(row.get(name, ""))


def _first_seed(scored: Scored) -> dict[str, PredictionRow]:
    """The rows of the first seed by their id."""
    rows = next(iter(scored.predictions().values()), [])
    return {str(row.get("id", index)): row for index, row in enumerate(rows)}


def teacher_of(scored: Scored) -> Scored:
    """The teacher's answers to the same set, with checksums of their own."""
    inside = f"{TEACHER}/"
    files = {k.removeprefix(inside): v for k, v in scored.scores.get("files", {}).items() if k.startswith(inside)}
    return Scored(scored.folder / TEACHER, {**scored.scores, "files": files})


def _told(row: PredictionRow) -> str:
    found = finite(row.get("scores", {}).get("rouge_l"))
    cut = "cut off at the limit" if row.get("truncated") else ""
    return ", ".join(part for part in (f"Rouge-L {number(found)}" if found is not None else "", cut) if part)


def _trained(run: Run, *, named: bool) -> list[Sample]:
    steps = sorted({row["step"] for row in run.samples if "step" in row})
    cards = []
    for step in dict.fromkeys([*steps[:1], *steps[-1:]]):
        for row in [row for row in run.samples if row.get("step") == step][:DURING]:
            columns = [Column(str(r.get("writer", "")), "", str(r.get("text", ""))) for r in row.get("responses", [])]
            where = f"{run.name} · step {step}" if named else f"step {step}"
            cards.append(Sample(f"{where} · {row.get('id', '')}", str(row.get("prompt", "")), columns))
    return cards


def tokens(runs: Sequence[Run]) -> list[Block]:
    """Answers of token_rewards.json; one scale of colors for the whole page."""
    every = [_reward(token) for run in runs for own in run.rewards for token in own.get("tokens", [])]
    sizes = sorted(abs(value) for value in every if value is not None)
    if not sizes:
        return []
    top = sizes[min(len(sizes) - 1, int(0.97 * len(sizes)))] or 1.0  # a few extremes do not bleach the rest
    found: dict[str, list[Column]] = {}
    for run in runs:
        for own in run.rewards:
            if own.get("tokens"):
                who = str(own.get("writer", "student"))
                column = _shaded(f"{run.name}: {who}" if len(runs) > 1 else who, own, top)
                found.setdefault(str(own.get("prompt", "")), []).append(column)
    return [Shades(top), *(Sample("", prompt, columns) for prompt, columns in found.items())]


def _reward(token: dict[str, object]) -> float | None:
    return finite(token.get("reward"))


def _shaded(who: str, own: TokenRewards, top: float) -> Column:
    rewards = [value for token in own["tokens"] if (value := _reward(token)) is not None]
    told = f"sum {number(sum(rewards))}, mean {number(sum(rewards) / max(1, len(rewards)))} nats per token"
    shaded = [
        Token(
            str(token.get("text", "")).replace("\n", "↵\n"), value, round(STRONGEST * min(1.0, abs(value or 0.0) / top))
        )
        for token in own["tokens"]
        for value in [_reward(token)]
    ]
    return Column(who, told, tokens=shaded)
