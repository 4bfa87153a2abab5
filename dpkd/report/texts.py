"""What the models wrote: samples side by side, and answers with every token shaded by its reward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dpkd.report.markup import Markup, element, joined
from dpkd.report.names import number
from dpkd.report.reading import Run, Scored
from dpkd.report.scales import finite

PER_SET = 3  # rows of each evaluated set
DURING = 2  # prompts of the first and of the last logged step
STRONGEST = 72  # per cent of colour at the strongest reward


def samples_section(runs: Sequence[Run]) -> Markup | None:
    """Answers to evaluated rows, then the responses that the runs trained on."""
    cards = [card for name in _sets(runs) for card in _evaluated(name, runs)]
    trained = [card for run in runs for card in _trained(run, named=len(runs) > 1)]
    if not cards and not trained:
        return None
    folded = None
    if trained:
        summary = element("summary", "Text that was trained on, at the first and at the last logged step")
        folded = element("details", summary, *trained, open=None if cards else "open")
    return joined(*cards, folded)


def _sets(runs: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(name for run in runs for name in run.evaluations))


def _evaluated(name: str, runs: Sequence[Run]) -> list[Markup]:
    """The first rows of a set: reference, teacher, and the answer of each run under its first seed."""
    answers = {run.name: _first_seed(run.evaluations[name]) for run in runs if name in run.evaluations}
    teachers = next(
        (rows for run in runs if name in run.evaluations if (rows := _first_seed(_teacher(run.evaluations[name])))), {}
    )
    first = next((rows for rows in answers.values() if rows), {})
    cards = []
    for key, row in list(first.items())[:PER_SET]:
        columns = [("reference", "", " / ".join(row.get("references", [])))]
        if key in teachers:
            columns.append(("teacher", "", str(teachers[key].get("prediction", ""))))
        for run, rows in answers.items():
            if key in rows:
                who = "student" if len(runs) == 1 else run
                columns.append((who, _told(rows[key]), str(rows[key].get("prediction", ""))))
        cards.append(_card(f"{name} · {key}", str(row.get("prompt", "")), columns))
    return cards


def _first_seed(scored: Scored) -> dict[str, dict[str, Any]]:
    """The rows of the first seed by their id."""
    rows = next(iter(scored.predictions().values()), [])
    return {str(row.get("id", index)): row for index, row in enumerate(rows)}


def _teacher(scored: Scored) -> Scored:
    return Scored(scored.folder / "teacher", scored.scores)


def _told(row: Mapping[str, Any]) -> str:
    found = finite(row.get("scores", {}).get("rouge_l"))
    cut = "cut off at the limit" if row.get("truncated") else ""
    return ", ".join(part for part in (f"Rouge-L {number(found)}" if found is not None else "", cut) if part)


def _trained(run: Run, *, named: bool) -> list[Markup]:
    steps = sorted({row["step"] for row in run.samples if isinstance(row.get("step"), int)})
    cards = []
    for step in dict.fromkeys([*steps[:1], *steps[-1:]]):
        for row in [row for row in run.samples if row.get("step") == step][:DURING]:
            columns = [(r.get("writer", ""), "", r.get("text", "")) for r in row.get("responses", [])]
            where = f"{run.name} · step {step}" if named else f"step {step}"
            cards.append(_card(f"{where} · {row.get('id', '')}", str(row.get("prompt", "")), columns))
    return cards


def _card(where: str, prompt: str, columns: Sequence[tuple[str, str, str]]) -> Markup:
    head = element("header", element("div", "prompt ", element("small", where), class_="who"), _text(prompt))
    shown = [
        element("div", element("div", f"{who} ", element("small", told), class_="who"), _text(text))
        for who, told, text in columns
    ]
    return element("article", head, element("div", *shown, class_="columns"), class_="card sample")


def _text(text: str) -> Markup:
    return element("p", text.strip() or "(empty)", class_="text" if text.strip() else "text dim")


def tokens_section(runs: Sequence[Run]) -> Markup | None:
    """Answers of token_rewards.json; one scale of colours for the whole page."""
    sizes = sorted(
        abs(v)
        for run in runs
        for own in run.rewards
        for t in own.get("tokens", ())
        if (v := finite(t.get("reward"))) is not None
    )
    if not sizes:
        return None
    top = sizes[min(len(sizes) - 1, int(0.97 * len(sizes)))] or 1.0  # a few extremes do not bleach the rest
    scale = element(
        "p",
        f"−{number(top)} the teacher likes it better",
        element("i", class_="shades"),
        f"the student likes it better +{number(top)}",
        class_="about",
    )
    cards = [_shaded(prompt, answers, top) for prompt, answers in _by_prompt(runs).items()]
    return joined(scale, *cards)


def _by_prompt(runs: Sequence[Run]) -> dict[str, list[tuple[str, Mapping[str, Any]]]]:
    """Who wrote, and the answer with its tokens, for each prompt."""
    found: dict[str, list[tuple[str, Mapping[str, Any]]]] = {}
    for run in runs:
        for own in run.rewards:
            if own.get("tokens"):
                writer = str(own.get("writer", "student"))
                who = f"{run.name}: {writer}" if len(runs) > 1 else writer
                found.setdefault(str(own.get("prompt", "")), []).append((who, own))
    return found


def _shaded(prompt: str, answers: Sequence[tuple[str, Mapping[str, Any]]], top: float) -> Markup:
    columns = []
    for who, own in answers:
        rewards = [value for token in own["tokens"] if (value := finite(token.get("reward"))) is not None]
        told = f"sum {number(sum(rewards))}, mean {number(sum(rewards) / max(1, len(rewards)))} nats per token"
        spans = [_token(str(token.get("text", "")), finite(token.get("reward")), top) for token in own["tokens"]]
        heading = element("div", f"{who} ", element("small", told), class_="who")
        columns.append(element("div", heading, element("p", *spans, class_="tokens")))
    head = element("header", element("div", "prompt", class_="who"), _text(prompt))
    return element("article", head, element("div", *columns, class_="columns"), class_="card sample")


def _token(text: str, reward: float | None, top: float) -> Markup:
    shown = text.replace("\n", "↵\n")
    if reward is None:
        return element("span", shown)
    strength = STRONGEST * min(1.0, abs(reward) / top)
    return element(
        "span", shown, class_="p" if reward >= 0 else "m", style=f"--a:{strength:.0f}%", title=f"{reward:+.3f}"
    )
