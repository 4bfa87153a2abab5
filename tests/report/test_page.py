"""The page: well-formed, self-contained, escaped, and complete."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from report_folders import add_dev, add_scores, lines, make_run, metric_rows

from dpkd.report.charts import chapters, length_panels
from dpkd.report.drawing import PALETTE, svg
from dpkd.report.page import page, write_page
from dpkd.report.reading import Run, read_runs

VOID = {"meta", "br", "hr", "img", "link", "input", "col"}
ATTACK = "</p><script>alert(1)</script>"


class Checked(HTMLParser):
    """Counts elements, and knows whether every one of them was closed in its place."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.words.append(data)

    def attributes(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.seen if name == tag]


@pytest.fixture
def runs(tmp_path: Path) -> list[Run]:
    first, second = make_run(tmp_path / "dpkd-1"), make_run(tmp_path / "rkl-1", "rkl")
    for path, shift in ((first, 0.0), (second, 1.5)):
        add_dev(path)
        add_scores(path / "eval", {10: [20.0 + shift, 30.0], 20: [22.0, 31.0 + shift]}, answer=f"ours {ATTACK}")
    add_scores(first / "eval" / "dolly" / "teacher-like", {10: [1.0]})  # a folder beneath a set is no set
    lines(first / "eval" / "dolly" / "teacher" / "predictions-10.jsonl", [{"id": "r:0", "prediction": "theirs"}])
    tokens = [{"text": " a<b", "reward": 0.5}, {"text": "\n", "reward": -0.25}, {"text": "?", "reward": "NaN"}]
    rewards = [{"prompt": "P", "writer": "student", "tokens": tokens}]
    (first / "token_rewards.json").write_text(json.dumps(rewards), encoding="utf-8")
    return read_runs([first, second])


@pytest.mark.parametrize("count", [1, 2])
def test_the_page_is_well_formed_and_needs_nothing_from_outside(runs: list[Run], count: int) -> None:
    text = page(runs[:count])
    found = Checked(text)
    assert found.open == []
    assert len(found.attributes("svg")) > 10
    for tag in ("script", "link", "img", "iframe", "object", "base", "form"):
        assert found.attributes(tag) == []
    outside = [a["href"] for a in found.attributes("a") if not (a["href"] or "").startswith("#")]
    assert set(outside) == {"https://example.org/abs?a=1&b=2"}
    for tag, attributes in found.seen:
        assert not {"src", "srcset", "action"} & set(attributes), tag
    styles = "".join(re.findall(r"<style>(.*?)</style>", text, re.S))
    assert len(styles) > 1000
    assert not re.search(r"url\(|@import|https?:", styles)
    (policy,) = [a["content"] for a in found.attributes("meta") if "http-equiv" in a]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    anchors = {a["id"] for a in found.attributes("section")}
    assert {f"#{anchor}" for anchor in anchors} == {a["href"] for a in found.attributes("a")} - set(outside)


def test_texts_of_models_and_people_are_escaped(runs: list[Run]) -> None:
    text = page(runs)
    assert ATTACK not in text
    assert "ours &lt;/p&gt;&lt;script&gt;" in text
    assert "sampled &lt;b&gt;bold&lt;/b&gt;" in text
    assert "the &lt;reference&gt;" in text
    assert "Say &amp; hi" in text
    assert " a&lt;b" in text
    assert "javascript:" not in text


def test_names_of_runs_and_sets_are_escaped_in_drawings_too(tmp_path: Path) -> None:
    """A folder's name is text, never markup, mathematics or an entry that matplotlib hides."""
    name = "_$\\frac{<i>&'\"$"
    paths = [make_run(tmp_path / name), make_run(tmp_path / "b")]
    for path in paths:
        add_dev(path)
        add_scores(path / "eval", {10: [1.0, 2.0]}, name=f"set {name}")
    text = page(read_runs(paths))
    assert Checked(text).open == []
    assert "<i>" not in text
    assert text.count("_$\\frac{&lt;i&gt;&amp;&#39;&#34;$") > 10


def test_everything_that_was_asked_for_is_there(runs: list[Run]) -> None:
    words = " ".join(" ".join(Checked(page(runs[:1])).words).split())
    for told in (
        "dpkd-1",
        "Loss terms, unweighted",
        "Loss terms, weighted",
        "KL on the text trained on",
        "Implicit reward",
        "Rouge-L on the dev slice",
        "Reward against reverse KL",
        "Reward margin",
        "Preference accuracy",
        "Length of the responses",
        "Rouge-L on dolly",
        "(30,∞)",
        "reference",
        "teacher",
        "student",
        "theirs",
        "Reward by token",
        "train.lr",
        "stories.jsonl",
        "torch 2.13",
        "6.0 s",
        "503 MiB",
        "25.75 ± 1.06",
        "1 too long",
    ):
        assert told in words, told
    assert "/data/stories" not in words, "paths of this machine stay here"
    assert "/models/" not in words


def test_several_runs_share_their_charts_and_the_best_is_marked(runs: list[Run]) -> None:
    text = page(runs)
    kl = next(panel for chapter in chapters(runs) for panel in chapter.panels if panel.key == "kl-kl-forward")
    assert [(curve.label, curve.color) for curve in kl.curves] == [("dpkd-1", 0), ("rkl-1", 1)]
    assert '<td class="n best">26.50 ± 1.06</td>' in text
    assert '<td class="n">25.75 ± 1.06</td>' in text
    assert "Where the runs differ" in text
    assert not any(panel.key.startswith("loss-weighted-weighted") for c in chapters(runs) for panel in c.panels)


def panel_of(runs: list[Run], key: str) -> Any:
    return next(panel for chapter in chapters(runs) for panel in chapter.panels if panel.key == key)


def curves(drawing: ElementTree.Element, color: int) -> list[list[tuple[float, float]]]:
    """The lines of a color in a drawing, each as its points; a line is cut where it is moved without drawing."""
    found = []
    for path in drawing.iter("path"):
        style = path.get("style", "")
        if f"stroke: var(--c{color})" in style and "fill: none" in style:
            for part in path.get("d", "").split("M")[1:]:
                numbers = [float(n) for n in re.findall(r"-?[\d.]+", part)]
                found.append(list(zip(numbers[::2], numbers[1::2], strict=True)))
    return found


def test_curves_break_where_a_value_is_not_finite(tmp_path: Path) -> None:
    path = make_run(tmp_path / "a")
    rows = metric_rows(7)
    rows[3]["kl/forward"] = "Infinity"
    lines(path / "metrics.jsonl", rows)
    panel = panel_of(read_runs([path]), "kl")
    drawing = ElementTree.fromstring(svg(panel))
    assert [len(line) for line in curves(drawing, 0)] == [3, 3]
    assert [len(line) for line in curves(drawing, 1)] == [7]
    assert "nan" not in svg(panel).lower()


def test_a_value_between_gaps_is_a_dot(tmp_path: Path) -> None:
    path = make_run(tmp_path / "a")
    rows = metric_rows(7)
    for place, row in enumerate(rows):
        del row["kl/reverse"]  # a curve beside another has markers of its own
        if place in (2, 4):
            row["kl/forward"] = "NaN"
    lines(path / "metrics.jsonl", rows)
    drawing = svg(panel_of(read_runs([path]), "kl"))
    assert len(re.findall(r"<use [^>]*fill: var\(--c0\)", drawing)) == 1


def test_all_drawings_are_xml_in_the_colors_of_the_page(runs: list[Run]) -> None:
    panels = [panel for chapter in chapters(runs[:1]) for panel in chapter.panels] + list(length_panels(runs))
    assert len(panels) > 10
    names: list[str] = []
    for panel in panels:
        drawn = svg(panel)
        drawing = ElementTree.fromstring(drawn)
        names += [one.get("id", "") for one in drawing.iter() if one.get("id")]
        told = " ".join("".join(one.itertext()) for one in drawing.iter("text"))
        assert "step" in told or "rows" in told or "reverse KL" in told, panel.key
        assert not re.search("|".join(PALETTE), drawn), panel.key
    assert svg(panels[0]) == svg(panels[0]), "the same bytes each time"
    assert len(names) == len(set(names)), "drawings share a page"


def test_a_point_lies_where_its_value_is(runs: list[Run]) -> None:
    """kl/reverse is 4/step: on an axis that starts at zero, heights have the ratios 4 : 2 : 4/3."""
    panel = panel_of(runs[:1], "kl")
    drawing = ElementTree.fromstring(svg(panel))
    (line,) = curves(drawing, 1)
    zero = max(y for path in drawing.iter("path") for y in _ys(path) if "var(--axis)" in path.get("style", ""))
    heights = [zero - y for _, y in line]
    assert heights[0] / heights[1] == pytest.approx(2.0, rel=0.01)
    assert heights[0] / heights[2] == pytest.approx(3.0, rel=0.01)


def _ys(path: ElementTree.Element) -> list[float]:
    return [float(n) for n in re.findall(r"-?[\d.]+", path.get("d", ""))][1::2]


def test_twenty_runs_have_twenty_colors(tmp_path: Path) -> None:
    runs = read_runs([make_run(tmp_path / f"r{i:02}", rows=2) for i in range(20)])
    panel = panel_of(runs, "kl-kl-forward")
    assert sorted({curve.color for curve in panel.curves}) == list(range(20))
    assert len(set(PALETTE)) == 20
    drawn = set(re.findall(r'fill: none; [^"]*stroke: var\(--(c\d+)\)', svg(panel)))
    assert drawn == {f"c{i}" for i in range(20)}


def test_what_shows_the_nll_is_called_nll(runs: list[Run]) -> None:
    rows = [{"step": s, "nll/student": 2.0 / s, "nll/teacher": 1.0} for s in (1, 2, 3)]
    lines(runs[0].path / "metrics.jsonl", rows)
    assert panel_of(read_runs([runs[0].path]), "nll").title == "NLL of the text trained on"
    assert "ikelihood" not in page(read_runs([runs[0].path]))


def test_metrics_under_their_old_names_are_drawn(tmp_path: Path) -> None:
    path = make_run(tmp_path / "old")
    rows = [{"step": s, "reward/preferred": 1.0, "reward/dispreferred": 0.5, "logp/preferred": -9.0} for s in (1, 2, 3)]
    lines(path / "metrics.jsonl", rows)
    runs = read_runs([path])
    assert [curve.label for curve in panel_of(runs, "reward").curves] == ["chosen", "rejected"]
    assert [curve.label for curve in panel_of(runs, "logp").curves] == ["chosen"]


def test_a_long_run_stays_small(tmp_path: Path) -> None:
    path = make_run(tmp_path / "long", rows=5000)
    assert len(page(read_runs([path]))) < 500_000


def test_a_run_that_has_hardly_begun(tmp_path: Path) -> None:
    path = make_run(tmp_path / "new", rows=1)
    for name in ("samples.jsonl", "README.md", "run.json"):
        (path / name).unlink()
    assert Checked(page(read_runs([path]))).open == []
    (path / "metrics.jsonl").unlink()
    assert Checked(page(read_runs([path]))).open == []


def test_scores_alone_make_a_page(tmp_path: Path) -> None:
    add_scores(tmp_path / "gpt2", {10: [1.0, 2.0]}, answer="half a pair: \ud800")
    write_page(read_runs([tmp_path / "gpt2"]), tmp_path / "out" / "page.html")
    text = (tmp_path / "out" / "page.html").read_text(encoding="utf-8")
    assert "half a pair: ?" in text
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["page.html"]


def test_tokens_are_shaded_by_sign_and_size(runs: list[Run]) -> None:
    spans: list[dict[str, Any]] = [a for a in Checked(page(runs[:1])).attributes("span") if "title" in a]
    assert [(s["class"], s["title"]) for s in spans] == [("p", "+0.500"), ("m", "-0.250")]
    strong, weak = (int(re.findall(r"\d+", s["style"])[0]) for s in spans)
    assert strong == 2 * weak > 0
