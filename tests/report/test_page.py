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

from dpkd.report.chapters import chapters, length_panels
from dpkd.report.charts import chart
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
    assert len(found.attributes("script")) == 1
    for tag in ("link", "img", "iframe", "object", "base", "form"):
        assert found.attributes(tag) == []
    outside = [a["href"] for a in found.attributes("a") if not (a["href"] or "").startswith("#")]
    assert set(outside) == {"https://example.org/abs?a=1&b=2"}
    for tag, attributes in found.seen:
        assert not {"src", "srcset", "action"} & set(attributes), tag
    styles = "".join(re.findall(r"<style>(.*?)</style>", text, re.S))
    assert len(styles) > 1000
    assert not re.search(r"url\(|@import|https?:", styles)
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
    assert [(curve.label, curve.colour) for curve in kl.curves] == [("dpkd-1", 0), ("rkl-1", 1)]
    assert '<td class="n best">26.50 ± 1.06</td>' in text
    assert '<td class="n">25.75 ± 1.06</td>' in text
    assert "Where the runs differ" in text
    assert not any(panel.key.startswith("loss-weighted-weighted") for c in chapters(runs) for panel in c.panels)


def test_curves_break_where_a_value_is_not_finite(tmp_path: Path) -> None:
    path = make_run(tmp_path / "a")
    rows = metric_rows(7)
    rows[3]["kl/forward"] = "Infinity"
    lines(path / "metrics.jsonl", rows)
    (run,) = read_runs([path])
    panel = next(panel for chapter in chapters([run]) for panel in chapter.panels if panel.key == "kl")
    drawing = ElementTree.fromstring(chart(panel))
    paths = [p for p in drawing.iter("path") if "c0" in p.get("class", "")]
    assert len(paths) == 2
    assert "nan" not in chart(panel).lower()
    assert "inf" not in chart(panel).lower()
    hover = json.loads(drawing.get("data-hover", ""))
    assert hover["series"][0]["values"][3] is None


def test_all_drawings_are_xml_with_everything_inside(runs: list[Run]) -> None:
    panels = [panel for chapter in chapters(runs[:1]) for panel in chapter.panels] + list(length_panels(runs))
    assert len(panels) > 10
    for panel in panels:
        drawing = ElementTree.fromstring(chart(panel))
        _, _, width, height = map(float, (drawing.get("viewBox") or "").split())
        for place in _places(drawing):
            assert -1 <= place[0] <= width + 1, panel.key
            assert -1 <= place[1] <= height + 1, panel.key


def _places(drawing: ElementTree.Element) -> list[tuple[float, float]]:
    found = []
    for one in drawing.iter():
        for x, y in (("x", "y"), ("cx", "cy"), ("x1", "y1"), ("x2", "y2")):
            if one.get(x) is not None:
                found.append((float(one.get(x, "")), float(one.get(y, ""))))
        numbers = [float(n) for n in re.findall(r"-?[\d.]+", one.get("d", ""))]
        found += list(zip(numbers[::2], numbers[1::2], strict=True))
    return found


def test_a_point_lies_where_its_value_is(runs: list[Run]) -> None:
    """kl/reverse is 4/step: on an axis that starts at zero, heights have the ratios 4 : 2 : 4/3."""
    panel = next(panel for chapter in chapters(runs[:1]) for panel in chapter.panels if panel.key == "kl")
    drawing = ElementTree.fromstring(chart(panel))
    line = next(p for p in drawing.iter("path") if "c1" in p.get("class", ""))
    numbers = [float(n) for n in re.findall(r"-?[\d.]+", line.get("d", ""))]
    zero = next(float(t.get("y1", "")) for t in drawing.iter("line") if t.get("class") == "zero")
    heights = [zero - y for y in numbers[1::2]]
    assert heights[0] / heights[1] == pytest.approx(2.0, rel=0.01)
    assert heights[0] / heights[2] == pytest.approx(3.0, rel=0.01)


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
