"""The model card of a run: what the student is, how it came to be, how it scores, and how to load it.

The head is that of `huggingface_hub`, with the scores as `model-index`, so that a hub shows and compares them. After an
evaluation only the scores are written again: what people wrote into the card stays as it is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from dpkd.api import Card
from dpkd.io import write_text
from dpkd.report import escapes
from dpkd.report.names import finite, ordered
from dpkd.report.reading import Scored, read_evaluations, title_of
from dpkd.run_folder import RunFolder

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCard

CARD_METRICS = ("rouge_l", "exact_match", "nll", "perplexity", "forward_kl", "reverse_kl")
_HEADING = "## Scores"
_AFTER = "## How to load it"  # where a card without scores gets them: before this


@dataclass(frozen=True)
class ScoreLine:
    """One row of the table of scores: `metric` is its key, `title` its name for people."""

    data: str
    metric: str
    title: str
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
    _write(folder / "README.md", model_card(facts))


def model_card(facts: CardFacts) -> ModelCard:
    """The card, with a YAML head that model hubs read."""
    from huggingface_hub import ModelCard, ModelCardData

    head = ModelCardData(
        library_name="peft" if facts.adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["knowledge-distillation", "dpkd", facts.loss],
        base_model=facts.base_model,
        datasets=list(facts.datasets) or None,
        model_name=facts.name if facts.scores else None,
        eval_results=_eval_results(facts.scores) or None,
    )
    return ModelCard(f"---\n{head.to_yaml()}\n---\n\n{_body(facts)}")


def _body(facts: CardFacts) -> str:
    environment = Environment(
        loader=PackageLoader("dpkd.report"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,  # it is Markdown: every value goes through one of these
    )
    environment.filters |= {
        "text": lambda value: escapes.markdown_text(str(value)),
        "prose": escapes.prose,
        "code": escapes.markdown_code,
        "fence": escapes.markdown_fence,
        "url": lambda url: quote(escapes.line(url), safe="%/:?#&=+,;@~.-_!$*'"),
    }
    training = {
        "teacher": facts.teacher,
        "student": facts.student,
        "data": facts.data,
        "examples": facts.examples,
        "optimizer steps": facts.steps,
    }
    return environment.get_template("card.md").render(
        name=facts.name,
        loss=facts.loss,
        card=facts.card,
        teacher=facts.teacher,
        student=facts.student,
        training=[(what, value) for what, value in training.items() if value is not None],
        settings=sorted(facts.settings.items()),
        scores=scores_section(facts.scores),
        loading=_loading(facts),
        versions=sorted(facts.versions.items()),
        bibtex="\n\n".join(source.bibtex.strip() for source in facts.card.sources if source.bibtex.strip()),
    )


def _loading(facts: CardFacts) -> str:
    """Code that loads model and tokenizer."""
    imports = ["from transformers import AutoModelForCausalLM, AutoTokenizer"]
    loader = "AutoModelForCausalLM"
    if facts.adapter:
        loader = "AutoPeftModelForCausalLM"
        imports = [f"from peft import {loader}", "from transformers import AutoTokenizer"]
    place = json.dumps(facts.model_folder)
    lines = [f"model = {loader}.from_pretrained({place})", f"tokenizer = AutoTokenizer.from_pretrained({place})"]
    return "\n".join([*imports, "", *lines])


def _eval_results(scores: Sequence[ScoreLine]) -> list[EvalResult]:
    from huggingface_hub import EvalResult

    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=line.data,
            dataset_name=line.data,
            metric_type=line.metric,
            metric_name=line.title,
            metric_value=round(line.value, 4),
        )
        for line in scores
    ]


def scores_section(scores: Sequence[ScoreLine]) -> str:
    """The table of scores under its heading; empty without scores."""
    if not scores:
        return ""
    lines = [f"{_HEADING}\n", "| data | metric | value | rows | seeds |", "| --- | --- | --- | --- | --- |"]
    for one in scores:
        value = f"{one.value:.2f}" if one.spread is None else f"{one.value:.2f} ± {one.spread:.2f}"
        counts = ["" if count is None else str(count) for count in (one.rows, one.seeds)]
        names = map(escapes.markdown_text, (one.data, one.title))
        lines.append(f"| {' | '.join([*names, value, *counts])} |")
    return "\n".join(lines)


def rescore(folder: Path, metrics: Sequence[str] = CARD_METRICS) -> bool:
    """Write the scores of all evaluations in `RUN/eval` into `RUN/README.md`, into its head and its section of scores.

    False, and nothing is written, where there is no card that can be read, or no scores. Raises DpkdError for a damaged
    scores.json.
    """
    from huggingface_hub import ModelCard

    path = RunFolder(folder).card
    lines = score_lines(list(read_evaluations(folder / "eval").values()), metrics)
    if not path.is_file() or not lines:
        return False
    try:
        text = path.read_text(encoding="utf-8")
        card = ModelCard(text, ignore_metadata_errors=True) if text.startswith("---") else None
    except (OSError, ValueError, TypeError, RecursionError, yaml.YAMLError):
        return False
    if card is None:
        _write(path, with_scores(text, lines))
        return True
    data: Any = card.data  # a ModelCardData, which the stubs call CardData
    data.model_name = data.model_name or folder.resolve().name
    data.eval_results = _eval_results(lines)
    card.text = with_scores(card.text, lines)
    _write(path, card)
    return True


def score_lines(evaluations: Sequence[Scored], metrics: Sequence[str] = CARD_METRICS) -> list[ScoreLine]:
    """Rows of the card's table: sets in their order, metrics as the papers report them, of benchmarks their own."""
    lines = []
    for one in evaluations:
        for metric in ordered(one.shown(metrics)):
            found = one.metrics[metric]
            if (mean := finite(found.get("mean"))) is not None:
                count = len(one.scores.get("seeds", []))
                # What does not depend on the answers was measured once, whatever the seeds.
                seeds = count if len(found.get("values", [])) == count else None
                sd, title = finite(found.get("sd")), title_of(metric, [one])
                lines.append(ScoreLine(one.name, metric, title, mean, sd, one.scores.get("rows"), seeds))
    return lines


def with_scores(text: str, lines: Sequence[ScoreLine]) -> str:
    """A card's text with these scores in place of its section of scores; without one, before the loading code."""
    sections = _sections(text)
    new = scores_section(lines)
    heads = [section.partition("\n")[0].strip() for section in sections]
    if _HEADING in heads:
        sections[heads.index(_HEADING)] = new + "\n\n"
    elif _AFTER in heads:
        sections.insert(heads.index(_AFTER), new + "\n\n")
    else:
        sections = [text.rstrip() + "\n\n", new]
    return "".join(sections).rstrip() + "\n"


def _sections(text: str) -> list[str]:
    """A card's text cut before each heading of the second level; what stands in a code fence is no heading."""
    sections = [""]
    fence = ""
    for line in text.splitlines(keepends=True):
        ticks = line[: len(line) - len(line.lstrip("`"))]
        if len(ticks) >= 3 and (not fence or (len(ticks) >= len(fence) and not line.strip("`\r\n "))):
            fence = "" if fence else ticks
        if not fence and line.startswith("## "):
            sections.append("")
        sections[-1] += line
    return sections


def _write(path: Path, card: ModelCard | str) -> None:
    write_text(path, f"{str(card).rstrip()}\n")
