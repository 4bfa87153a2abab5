"""Scores for a model card that is there already: after an evaluation, only its section of scores is written anew.

What people wrote into the card stays as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dpkd.io import write_text
from dpkd.report.card import ScoreLine, scores_section
from dpkd.report.names import ordered, title
from dpkd.report.reading import Scored, read_evaluations
from dpkd.report.scales import finite
from dpkd.run_folder import RunFolder

CARD_METRICS = ("rouge_l", "exact_match", "nll", "perplexity", "forward_kl", "reverse_kl")
_HEADING = "## Scores"
_AFTER = "## How to load it"  # where a card without scores gets them: before this


def rescore(folder: Path, metrics: Sequence[str] = CARD_METRICS) -> bool:
    """Write the scores of all evaluations in `RUN/eval` into `RUN/README.md`.

    False, and nothing is written, where there is no card or there are no scores. Raises DpkdError for a damaged
    scores.json.
    """
    run = RunFolder(folder)
    lines = score_lines(list(read_evaluations(folder / "eval").values()), metrics)
    if not run.card.is_file() or not lines:
        return False
    write_text(run.card, with_scores(run.card.read_text(encoding="utf-8"), lines))
    return True


def score_lines(evaluations: Sequence[Scored], metrics: Sequence[str] = CARD_METRICS) -> list[ScoreLine]:
    """Rows of the card's table: sets in their order, metrics as the papers report them."""
    lines = []
    for one in evaluations:
        for metric in ordered(name for name in metrics if name in one.metrics):
            mean = finite(one.metrics[metric].get("mean"))
            if mean is not None:
                count = len(one.scores.get("seeds", []))
                # What does not depend on the answers was measured once, whatever the seeds.
                seeds = count if len(one.metrics[metric].get("values", [])) == count else None
                sd = finite(one.metrics[metric].get("sd"))
                lines.append(ScoreLine(one.name, title(metric), mean, sd, one.scores.get("rows"), seeds))
    return lines


def with_scores(card: str, lines: Sequence[ScoreLine]) -> str:
    """A card with these scores in place of its section of scores; without one, they go before the loading code."""
    sections = _sections(card)
    new = scores_section(lines)
    heads = [section.partition("\n")[0].strip() for section in sections]
    if _HEADING in heads:
        sections[heads.index(_HEADING)] = new + "\n\n"
    elif _AFTER in heads:
        sections.insert(heads.index(_AFTER), new + "\n\n")
    else:
        sections = [card.rstrip() + "\n\n", new]
    return "".join(sections).rstrip() + "\n"


def _sections(card: str) -> list[str]:
    """The card cut before each heading of the second level; what stands in a code fence is no heading."""
    sections = [""]
    fence = ""
    for line in card.splitlines(keepends=True):
        ticks = line[: len(line) - len(line.lstrip("`"))]
        if len(ticks) >= 3 and (not fence or (len(ticks) >= len(fence) and not line.strip("`\r\n "))):
            fence = "" if fence else ticks
        if not fence and line.startswith("## "):
            sections.append("")
        sections[-1] += line
    return sections
