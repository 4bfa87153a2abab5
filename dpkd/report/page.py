"""One self-contained page about one or several runs: no network, opens from disk."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

from dpkd.io import write_bytes
from dpkd.report.chapters import chapters, length_panels
from dpkd.report.charts import chart, legend
from dpkd.report.markup import Markup, element, joined
from dpkd.report.overview import overview, subtitle
from dpkd.report.panels import Panel
from dpkd.report.reading import Run
from dpkd.report.tables import scores_tables, settings_section, technical_section
from dpkd.report.texts import samples_section, tokens_section


def write_page(runs: Sequence[Run], output: Path) -> None:
    """Write the page; it appears whole or not at all."""
    # Half a surrogate pair in a model's answer has no UTF-8; a question mark stands for it.
    write_bytes(output, page(runs).encode("utf-8", errors="replace"))


def page(runs: Sequence[Run]) -> str:
    """The page as HTML."""
    sections = [section for section in _sections(runs) if section is not None]
    names = ", ".join(run.name for run in runs)
    one = f"{runs[0].loss} · a distillation run" if len(runs) == 1 and runs[0].loss else f"{len(runs)} runs compared"
    links = [element("a", title, href=f"#{key}") for key, title, _ in sections]
    body = element(
        "body",
        element(
            "header",
            element("div", element("div", one, class_="eyebrow"), element("h1", names), element("p", subtitle(runs))),
            class_="top",
        ),
        element("nav", element("div", *links)),
        element("main", *(content for _, _, content in sections), _footer()),
        element("script", Markup(_asset("page.js"))),
    )
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", f"{names} · dpkd report"),
        element("style", Markup(_asset("page.css"))),
    )
    return f"<!doctype html>\n{element('html', head, body, lang='en')}\n"


def _asset(name: str) -> str:
    return files("dpkd.report").joinpath(name).read_text(encoding="utf-8")


def _footer() -> Markup:
    return element("footer", f"Written by dpkd {version('dpkd')} from the files of the run folders alone.")


def _sections(runs: Sequence[Run]) -> list[tuple[str, str, Markup] | None]:
    """Anchor, name in the navigation, and content of each section that has something to say."""
    bars = length_panels(runs)
    scores = scores_tables(runs)
    found = [_section("overview", "Overview", "", overview(runs))]
    if scores or bars:
        about = (
            "Mean ± standard deviation over seeds. The best run of a row is bold."
            if len(runs) > 1
            else ("Mean ± standard deviation over seeds.")
        )
        found.append(_section("scores", "Scores", about, joined(*scores, _grid(bars) if bars else None)))
    for chapter in chapters(runs):
        found.append(_section(chapter.key, chapter.title, chapter.about, _grid(chapter.panels)))
    for key, title, about, content in (
        ("samples", "Samples", "What the models write.", samples_section(runs)),
        ("tokens", "Reward by token", "Each token of an answer, shaded by its implicit reward.", tokens_section(runs)),
        ("settings", "Settings", "", settings_section(runs)),
        ("technical", "Data, versions, sources", "", technical_section(runs)),
    ):
        found.append(_section(key, title, about, content))
    return found


def _section(key: str, title: str, about: str, content: Markup | None) -> tuple[str, str, Markup] | None:
    if not content:
        return None
    told = element("p", about, class_="about") if about else None
    return key, title, element("section", element("h2", title), told, content, id=key)


def _grid(panels: Sequence[Panel]) -> Markup:
    return element("div", *(_figure(panel) for panel in panels), class_="grid")


def _figure(panel: Panel) -> Markup:
    note = element("p", panel.note, class_="note") if panel.note else None
    heading = element("figcaption", element("h3", panel.title), note)
    return element("figure", heading, legend(panel), chart(panel), class_="panel")
