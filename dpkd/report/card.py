"""The model card of a run: what the student is, how it came to be, and how to load it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from dpkd.api import Card
from dpkd.io import write_text


@dataclass(frozen=True)
class ScoreLine:
    """One row of the table of scores."""

    data: str
    metric: str
    value: float
    spread: float | None = None  # standard deviation over seeds
    rows: int | None = None
    seeds: int | None = None


@dataclass(frozen=True)
class CardFacts:
    """All that a model card says.

    settings      those that differ from the defaults, by dotted path
    versions      of packages and plugins
    base_model    hub id of the student's start, where it has one: hubs link to it
    datasets      hub ids of the data, where they have one
    model_folder  where the weights are, seen from the card
    adapter       the weights are a low-rank adapter, to be loaded through peft
    """

    name: str
    loss: str
    card: Card
    teacher: str | None
    student: str
    data: str
    steps: int | None = None
    examples: int | None = None
    settings: Mapping[str, object] = field(default_factory=dict)
    scores: Sequence[ScoreLine] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    base_model: str | None = None
    datasets: Sequence[str] = ()
    model_folder: str = "model"
    adapter: bool = False


def write_model_card(folder: Path, facts: CardFacts) -> None:
    """Write `README.md` into a run folder, in place of an older one."""
    write_text(folder / "README.md", model_card(facts))


def model_card(facts: CardFacts) -> str:
    """The card as Markdown with a YAML head that model hubs read."""
    sections = [
        _head(facts),
        f"# {_line(facts.name)}",
        _summary(facts),
        _loss(facts),
        _training(facts),
        scores_section(facts.scores),
        _loading(facts),
        _versions(facts),
        _sources(facts),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _head(facts: CardFacts) -> str:
    head: dict[str, object] = {
        "library_name": "peft" if facts.adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["knowledge-distillation", "dpkd", facts.loss],
    }
    if facts.base_model is not None:
        head["base_model"] = facts.base_model
    if facts.datasets:
        head["datasets"] = list(facts.datasets)
    return f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---"


def _summary(facts: CardFacts) -> str:
    taught = "trained" if facts.teacher is None else f"distilled from {_code(facts.teacher)}"
    return f"{_code(facts.student)}, {taught} with the loss {_code(facts.loss)} of dpkd."


def _loss(facts: CardFacts) -> str:
    card = facts.card
    parts = [f"## Loss: {_line(card.title)}", _line(card.summary), _fenced(card.formula, "text"), _line(card.notes)]
    return "\n\n".join(part for part in parts if part)


def _training(facts: CardFacts) -> str:
    rows = [("teacher", facts.teacher), ("student", facts.student), ("data", facts.data)]
    rows += [("examples", facts.examples), ("optimizer steps", facts.steps)]  # type: ignore[list-item]
    table = _table(("what", "which"), [(what, _code(value)) for what, value in rows if value is not None])
    if not facts.settings:
        return f"## Training\n\n{table}\n\nAll settings are the defaults of dpkd and of the loss."
    settings = [(_code(path), _code(value)) for path, value in sorted(facts.settings.items())]
    differing = _table(("setting", "value"), settings)
    return f"## Training\n\n{table}\n\nSettings that differ from the defaults:\n\n{differing}"


def scores_section(scores: Sequence[ScoreLine]) -> str:
    """The table of scores under its heading; empty without scores."""
    if not scores:
        return ""
    rows = [
        (line.data, line.metric, _value(line), *("" if n is None else str(n) for n in (line.rows, line.seeds)))
        for line in scores
    ]
    return "## Scores\n\n" + _table(("data", "metric", "value", "rows", "seeds"), rows)


def _value(line: ScoreLine) -> str:
    return f"{line.value:.2f}" if line.spread is None else f"{line.value:.2f} ± {line.spread:.2f}"


def _loading(facts: CardFacts) -> str:
    loader, package = (
        ("AutoPeftModelForCausalLM", "peft") if facts.adapter else ("AutoModelForCausalLM", "transformers")
    )
    imports = {package: [loader]}
    imports.setdefault("transformers", []).append("AutoTokenizer")
    code = [f"from {name} import {', '.join(sorted(names))}" for name, names in sorted(imports.items())]
    place = json.dumps(facts.model_folder)
    code += ["", f"model = {loader}.from_pretrained({place})"]
    code += [f"tokenizer = AutoTokenizer.from_pretrained({place})"]
    return "## How to load it\n\nFrom the folder of this file:\n\n" + _fenced("\n".join(code), "python")


def _versions(facts: CardFacts) -> str:
    return "## Versions\n\n" + _table(("package", "version"), sorted(facts.versions.items())) if facts.versions else ""


def _sources(facts: CardFacts) -> str:
    sources = facts.card.sources
    if not sources:
        return ""
    lines = [f"- [{_line(s.title)}]({s.url})" + (f", {_line(s.where)}" if s.where else "") for s in sources]
    bibtex = "\n\n".join(s.bibtex.strip() for s in sources if s.bibtex.strip())
    return "## Sources\n\n" + "\n".join(lines) + (f"\n\n{_fenced(bibtex, 'bibtex')}" if bibtex else "")


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *([_line(cell).replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _line(text: str) -> str:
    return " ".join(text.split())


def _code(value: object) -> str:
    """As inline code, whatever backticks are inside."""
    text = _line(str(value))
    ticks = "`" * (_longest_run(text) + 1)
    space = " " if text.startswith("`") or text.endswith("`") or not text else ""
    return f"{ticks}{space}{text}{space}{ticks}"


def _fenced(text: str, language: str) -> str:
    fence = "`" * max(3, _longest_run(text) + 1)
    return f"{fence}{language}\n{text.strip()}\n{fence}"


def _longest_run(text: str) -> int:
    """Backticks in a row."""
    longest = run = 0
    for character in text:
        run = run + 1 if character == "`" else 0
        longest = max(longest, run)
    return longest
