"""Tables and card pages of the built-in losses, from their specs. Markdown; no file is read or written."""

from __future__ import annotations

import html
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from dpkd.api import LossSpec
from dpkd.cli.describe import facts, range_text, value_text
from dpkd.cli.losses import _row
from dpkd.plugins import RegisteredLoss, load_registry

FAMILIES = {
    "token": "Token losses: a value per response position",
    "pair": "Pair losses: a chosen and a rejected response to each prompt",
    "rollout": "Rollout losses: policy gradients on sampled responses",
}
OWN_LINE = ("use when", "avoid when", "unconfirmed", "notes", "preset of", "sources", "suggests", "from", "family")


def built_in() -> list[RegisteredLoss]:
    """The losses of this distribution, by name. Raises SystemExit when one is missing: the pages would lack it."""
    registry = load_registry({})
    conflicts = [message for _, message in registry.conflicts(LossSpec).values()]
    broken = [f"{plugin.entry_point}: {plugin.reason}" for plugin in registry.broken if plugin.distribution == "dpkd"]
    if broken or conflicts:
        raise SystemExit("\n".join([*broken, *conflicts]))
    return sorted((loss for loss in registry.losses.values() if loss.distribution == "dpkd"), key=lambda x: x.spec.name)


def zoo() -> str:
    """The built-in losses by family, a line each, with links to their cards."""
    losses = built_in()
    sections = [f"{len(losses)} losses are built in."]
    confirmed = [loss for loss in losses if not loss.spec.card.unconfirmed]
    for family, title in FAMILIES.items():
        sections += [f"### {title}", _family(loss for loss in confirmed if loss.spec.family.value == family)]
    sections += [
        "### Contrib: not confirmed against the paper",
        "Their cards say what is not confirmed.",
        _family(loss for loss in losses if loss.spec.card.unconfirmed),
    ]
    return "\n\n".join(sections)


def _family(losses: Iterable[RegisteredLoss]) -> str:
    lines = ((_link(r["name"]), r["summary"], r["needs"], _paper(r["paper"])) for r in map(_row, losses))
    return table(("loss", "what", "needs of the teacher", "paper"), lines)


def _link(name: str) -> str:
    return f"[`{name}`](losses/{name}.md)"


def _paper(url: str) -> str:
    short = url.removeprefix("https://").removeprefix("arxiv.org/abs/").removeprefix("github.com/")
    return f"[{short}]({url})" if url else ""


def pages() -> dict[str, str]:
    """Loss → its card page."""
    return {loss.spec.name: "\n\n".join(_card(loss)) + "\n" for loss in built_in()}


def _card(loss: RegisteredLoss) -> Iterator[str]:
    spec, card, told = loss.spec, loss.spec.card, facts(loss, _row(loss))
    yield f"# {spec.name}: {card.title}"
    yield escaped(card.summary)
    yield f"```math\n{card.latex}\n```" if card.latex else f"```text\n{card.formula}\n```"
    if card.unconfirmed:
        yield f"**Not confirmed:** {escaped(card.unconfirmed)}"
    yield f"**Use it when:** {escaped(card.use_when)}"
    yield f"**Not when:** {escaped(card.avoid_when)}"
    yield table(
        ("family", f"[{spec.family.value}](../zoo.md)"),
        [
            *([("preset of", f"[`{spec.preset_of}`]({spec.preset_of}.md)")] if spec.preset_of else []),
            *((key, escaped(value)) for key, value in told.items() if value and key not in OWN_LINE),
            ("reads", ", ".join(f"`{signal}`" for signal in sorted(spec.signals()))),
            ("file", f"`{os.path.relpath(loss.file, _root())}`"),
        ],
    )
    yield f"```bash\ndpkd train --loss {spec.name} --teacher TEACHER --student STUDENT --data DATA\n```"
    yield "## Settings"
    yield _settings(spec.config.model_json_schema())
    if told["suggests"]:
        yield "It suggests these settings of the run; yours win:"
        yield "\n".join(f"- `{line}`" for line in told["suggests"].splitlines())
    if card.notes:
        yield "## Notes"
        yield escaped(card.notes)
    yield "## Sources"
    yield "\n".join(f"- [{s.title}]({s.url}){f', {s.where}' if s.where else ''}" for s in card.sources)
    bibtex = "\n\n".join(s.bibtex for s in card.sources if s.bibtex)
    if bibtex:
        yield f"```bibtex\n{bibtex}\n```"


def _root() -> str:
    return os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def _settings(schema: Mapping[str, Any]) -> str:
    fields = schema.get("properties", {})
    if not fields:
        return "None."
    return table(
        ("`loss.`", "default", "range", "meaning", "default from"),
        (
            (
                f"`{name}`",
                f"`{value_text(field.get('default'))}`",
                escaped(range_text(field)),
                escaped(field.get("description", "")),
                escaped(field.get("source", "")),
            )
            for name, field in fields.items()
        ),
    )


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; a bar within a cell is escaped, a line break is kept."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", "<br>") for cell in cells) + " |"

    return "\n".join([line(head), "|" + "---|" * len(head), *map(line, rows)])


def escaped(text: str) -> str:
    """Plain text in Markdown: no emphasis, no tags."""
    return html.escape(text, quote=False).replace("*", "\\*").replace("_", "\\_").replace("`", "\\`")
