"""The page of a sweep: its folder read, and every section against numbers that the test derives itself."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report_folders import add_dev, add_scores, lines, make_run
from scipy import stats
from test_page import Checked
from typer.testing import CliRunner

from dpkd.cli.main import app
from dpkd.errors import DpkdError, SettingsError
from dpkd.report import drawing
from dpkd.report.bootstrap import mean_interval
from dpkd.report.charts import Curve, LinePanel
from dpkd.report.drawing import GLYPHS, PALETTE, svg
from dpkd.report.experiment import Experiment, read_experiment
from dpkd.report.page import sweep_page
from dpkd.report.ranking import Standing, front, sets_of, standings
from dpkd.report.sweep_charts import (
    budget_panels,
    collapse_panels,
    correlations,
    cost_panels,
    reward_panels,
    sweep_figures,
)

# Rouge-L of six rows, under one sampling seed; the first is the baseline, by its loss.
ROUGE = {
    "given-sft": [10.0, 20.0, 0.0, 40.0, 5.0, 15.0],
    "given-kd": [11.0, 21.0, 1.0, 41.0, 6.0, 16.0],
    "pairs-dpkd": [30.0, 40.0, 20.0, 60.0, 25.0, 35.0],
    "pairs-dpo": [1.0, 2.0, 0.0, 4.0, 0.5, 1.5],
    "mixed-gkd": [12.0, 19.0, 2.0, 38.0, 7.0, 14.0],
}
SECONDS = {"given-sft": 1.0, "given-kd": 2.0, "pairs-dpkd": 8.0, "pairs-dpo": 9.0, "mixed-gkd": 3.0}
KL = {"given-sft": 1.9, "given-kd": 1.7, "pairs-dpkd": 0.9, "pairs-dpo": 3.0, "mixed-gkd": 1.8, "start": 2.1}
STEPS = (1, 10, 20, 30, 40, 50)


def trained(folder: Path, name: str, loss: str, *, models: dict[str, str], lr: float = 0.0005) -> Path:
    """A run whose teacher and student are models of other runs."""
    path = make_run(folder / name, loss)
    text = (path / "config.resolved.yaml").read_text()
    teacher = f"{models['teacher']}" if "teacher" in models else "/models/big"
    text = text.replace("model: /models/big", f"model: {teacher}").replace("lr: 0.0005", f"lr: {lr}")
    if "start" in models:
        text = text.replace("model: null", f"model: {models['start']}")
    (path / "config.resolved.yaml").write_text(text)
    return path


def more_scores(path: Path, **metrics: float) -> None:
    (file,) = path.glob("eval/dolly/scores.json")
    scores = json.loads(file.read_text())
    scores["metrics"] |= {name: {"mean": value, "sd": None, "values": [value]} for name, value in metrics.items()}
    file.write_text(json.dumps(scores))


def pair_rows(*, collapses: bool) -> list[dict[str, Any]]:
    """Responses of 10 and of 20 tokens; each step of a collapse takes 1 nat per token from one, 2 from the other."""
    fall = 1.0 if collapses else 0.0
    return [
        {
            "step": step,
            "logp/chosen": 10.0 * (-2.0 - fall * i),
            "length/chosen": 10.0,
            "logp/rejected": 20.0 * (-2.5 - 2 * fall * i),
            "length/rejected": 20.0,
            "reward/margin": 0.5 * i,
            "reward/accuracy": 0.5,
            "kl/reverse": 1.0 + 0.05 * i,
            "seconds": 1.0,
            "tokens_per_second": 50.0,
        }
        for i, step in enumerate(STEPS)
    ]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Teacher, start, a grid of two, five methods, one failed run and one that was left."""
    sweep = tmp_path / "evidence"
    trained(sweep, "teacher", "sft", models={})
    trained(sweep, "start", "sft", models={"teacher": str(sweep / "teacher/model")})
    models = {"teacher": str(sweep / "teacher/model"), "start": str(sweep / "start/model")}
    for lr in (0.1, 0.2):
        trained(sweep, f"lr-lr_{lr}", "kd", models=models, lr=lr)
    for name, values in ROUGE.items():
        path = trained(sweep, name, name.partition("-")[2], models=models)
        add_scores(path / "eval", {10: values}, answer=f"answer of {name}")
        more_scores(path, reverse_kl=KL[name], forward_kl=1.0, reward_mean=-KL[name], student_answer_reward_mean=1.0)
        rows = pair_rows(collapses=name == "pairs-dpo") if name.startswith("pairs") else [{"step": 1}]
        rows[0] |= {"seconds": SECONDS[name] - (len(rows) - 1), "tokens_per_second": 100.0, "peak_memory_mib": 2048.0}
        lines(path / "metrics.jsonl", rows)
    trained(sweep, "mixed-distillm", "distillm", models=models)
    add_scores(sweep / "start/eval", {10: [9.0] * 6}, answer="answer of start")
    more_scores(sweep / "start", reverse_kl=KL["start"], reward_mean=-KL["start"])
    add_scores(sweep / "teacher/eval", {10: [50.0] * 6}, answer="answer of teacher")
    values = {"lr-lr_0.1": 3.0, "lr-lr_0.2": 4.0}
    choice = {"metric": "rouge_l", "chosen": {"train.lr": 0.2}, "run": "lr-lr_0.2", "values": values}
    (sweep / "choices.json").write_text(json.dumps({"lr": choice}))
    listed = ["teacher", "start", *values, *ROUGE, "mixed-distillm", "mixed-opd"]
    states = {"mixed-distillm": ("failed", "not <finite>"), "mixed-opd": ("left", "no time was left")}
    record = [
        {"name": name, "stage": name.partition("-")[0], "scored": name not in values, "state": state, "reason": reason}
        for name in listed
        for state, reason in [states.get(name, ("finished", ""))]
    ]
    (sweep / "sweep.json").write_text(json.dumps({"runs": record}))
    return sweep


def words_of(experiment: Experiment) -> str:
    return " ".join(" ".join(Checked(sweep_page(experiment)).words).split())


def methods(table: list[Standing]) -> list[Standing]:
    return [one for one in table if one.rank]


def test_what_each_run_is_for(folder: Path) -> None:
    found = read_experiment(folder)
    assert [run.name for run in found.methods] == list(ROUGE)
    assert [run.name for run in found.references] == ["teacher", "start"]
    assert list(found.tried) == ["lr-lr_0.1", "lr-lr_0.2"]
    assert [(row["name"], row["state"]) for row in found.missing] == [
        ("mixed-distillm", "failed"),
        ("mixed-opd", "left"),
    ]
    assert found.baseline == "given-sft"
    assert [color for _, color in found.members] == [0, 1, 2, 3, 4]


def test_a_folder_that_moved_and_says_nothing_of_itself(folder: Path, tmp_path: Path) -> None:
    (folder / "sweep.json").unlink()
    (folder / "choices.json").unlink()
    moved = folder.rename(tmp_path / "elsewhere")
    found = read_experiment(moved)
    assert [run.name for run in found.references] == ["start", "teacher"]
    assert "What is missing" not in words_of(found)


def test_what_was_removed_since_is_missing(folder: Path) -> None:
    (folder / "given-kd/eval/dolly/scores.json").unlink()
    for file in sorted((folder / "pairs-dpo").rglob("*"), reverse=True):
        file.unlink() if file.is_file() else file.rmdir()
    (folder / "pairs-dpo").rmdir()
    found = {row["name"]: row["state"] for row in read_experiment(folder).missing}
    assert found["given-kd"] == "not scored"
    assert found["pairs-dpo"] == "no folder"


def test_a_damaged_record_is_named(folder: Path) -> None:
    (folder / "sweep.json").write_text('{"runs": 3}')
    with pytest.raises(DpkdError, match=r"sweep\.json: damaged: runs"):
        read_experiment(folder)


def test_the_ranking_has_means_intervals_and_corrected_tests(folder: Path) -> None:
    table = standings(read_experiment(folder), "dolly")
    means = {name: float(np.mean(values)) for name, values in ROUGE.items()}
    assert [one.run.name for one in table[:2]] == ["teacher", "start"]
    assert [one.run.name for one in methods(table)] == sorted(means, key=lambda name: -means[name])
    for one in methods(table):
        assert one.mean == pytest.approx(means[one.run.name])
        assert one.interval == mean_interval(ROUGE[one.run.name])
    # Each row of kd is 1 above that of sft, so every resample has the same sign: p is the least that there can be,
    # and Holm multiplies it by the number of methods that are tested: four, of which three tie for the smallest.
    found = {one.run.name: one.difference for one in methods(table)}
    assert found["given-sft"] is None
    kd = found["given-kd"]
    assert kd is not None
    assert (kd.mean, kd.p) == (pytest.approx(1.0), pytest.approx(2 / 10_001))
    assert kd.corrected == pytest.approx(4 * 2 / 10_001)


def test_an_interval_is_that_of_all_resamples() -> None:
    """Five rows have 5^5 equally likely draws; the ends of the interval are quantiles of their means."""
    values = [0.0, 1.0, 4.0, 9.0, 20.0]
    grid = np.stack(np.meshgrid(*[values] * 5), -1).reshape(-1, 5).mean(axis=1)
    found = mean_interval(values, resamples=200_000)
    assert found == pytest.approx(np.percentile(grid, [2.5, 97.5]), abs=0.25)
    assert mean_interval([1.0]) is None


def test_seeds_are_one_method_with_a_stroke_for_each(folder: Path) -> None:
    first = folder / "given-sft"
    for seed in (11, 12):
        path = folder / f"given-sft-seed_{seed}"
        text = (first / "config.resolved.yaml").read_text().replace("seed: 10", f"seed: {seed}")
        make_run(path, "sft")
        (path / "config.resolved.yaml").write_text(text)
        (path / "run.json").write_text((first / "run.json").read_text())
        add_scores(path / "eval", {10: [value + seed for value in ROUGE["given-sft"]]})
    found = read_experiment(folder)
    (one,) = [one for one in standings(found, "dolly") if one.run.name == found.baseline]
    assert one.seeds == pytest.approx([15.0, 26.0, 27.0])
    assert one.mean == pytest.approx(np.mean([15.0, 26.0, 27.0]))
    assert found.baseline == "given-sft"


def test_the_baseline_may_be_another(folder: Path) -> None:
    assert read_experiment(folder, Path("given-kd")).baseline == "given-kd"
    table = methods(standings(read_experiment(folder, Path("start")), "dolly"))
    gaps = {one.run.name: one.difference.mean for one in table if one.difference is not None}
    assert gaps == pytest.approx({name: float(np.mean(values)) - 9.0 for name, values in ROUGE.items()})
    with pytest.raises(SettingsError, match=r"--baseline lr-lr_0\.1: not among the models that are compared"):
        read_experiment(folder, Path("lr-lr_0.1"))


def test_the_best_within_a_budget(folder: Path) -> None:
    """By seconds: sft 1 (15), kd 2 (16), gkd 3 (15.3), dpkd 8 (35), dpo 9 (1.5)."""
    table = standings(read_experiment(folder), "dolly")
    seconds, tokens, memory = cost_panels(table, "dolly")
    assert seconds.front == ((1.0, pytest.approx(15.0)), (2.0, pytest.approx(16.0)), (8.0, pytest.approx(35.0)))
    assert {point.label: point.x for point in seconds.points} == SECONDS
    # sft: 1 s at 100 tokens/s; dpkd: 3 s at 100 and five windows of 1 s at 50
    assert {p.label: p.x for p in tokens.points}["given-sft"] == pytest.approx(100.0)
    assert {p.label: p.x for p in tokens.points}["pairs-dpkd"] == pytest.approx(550.0)
    assert {p.x for p in memory.points} == {2.0}
    assert dict(seconds.lines) == {"teacher": 50.0, "start": 9.0}
    assert "Within a budget of seconds" in words_of(read_experiment(folder))


@pytest.mark.parametrize("seed", range(5))
def test_the_front_is_what_no_cheaper_one_beats(seed: int) -> None:
    generator = np.random.default_rng(seed)
    costs, scores = generator.integers(0, 6, 12).tolist(), generator.integers(0, 6, 12).tolist()
    found = front(costs, scores)
    for budget in sorted(set(costs)):
        best = max(score for cost, score in zip(costs, scores, strict=True) if cost <= budget)
        assert max(scores[i] for i in found if costs[i] <= budget) == best
    assert [scores[i] for i in found] == sorted({scores[i] for i in found})


def test_dev_scores_at_equal_cost(folder: Path) -> None:
    add_dev(folder / "pairs-dpkd", (10, 50))
    seconds, tokens = budget_panels(read_experiment(folder))
    (curve,) = seconds.curves
    assert curve.steps == (4.0, 8.0), "3 s for the first line, 1 s for each of the others"
    assert curve.values == (20.0, 60.0)
    assert tokens.curves[0].steps == (350.0, 550.0)
    assert seconds.x_label == "seconds of training"


def test_collapse_is_drawn_per_token_and_told(folder: Path) -> None:
    found = read_experiment(folder)
    panels = {panel.key: panel for panel in collapse_panels(found)}
    chosen = {curve.label: curve.values for curve in panels["collapse-logp-chosen"].curves}
    rejected = {curve.label: curve.values for curve in panels["collapse-logp-rejected"].curves}
    assert chosen == {"pairs-dpkd": (-2.0,) * 6, "pairs-dpo": (-2.0, -3.0, -4.0, -5.0, -6.0, -7.0)}
    assert rejected["pairs-dpo"] == (-2.5, -4.5, -6.5, -8.5, -10.5, -12.5)
    # More than 1 nat below the best from the third logged step on; the third such step is that of 40.
    words = words_of(found)
    assert "collapsed, at step 40" in words
    assert "−2.000 → −7.000 −2.500 → −12.50" in words
    assert words.count("held") == 1


def test_reward_against_kl_and_its_correlation(folder: Path) -> None:
    found = read_experiment(folder)
    table = standings(found, "dolly")
    own, references = reward_panels(table, "dolly")
    points = {point.label: (point.x, point.y, point.value) for point in references.points}
    assert points["pairs-dpkd"] == (0.9, -0.9, pytest.approx(35.0))
    assert points["start"] == (2.1, -2.1, 9.0)
    assert "teacher" not in points, "it has no divergence from itself"
    assert len(own.points) == len(ROUGE)
    kls = [KL[name] for name in (*ROUGE, "start")]
    means = [float(np.mean(values)) for values in ROUGE.values()] + [9.0]
    result = dict(correlations(table, "dolly"))
    assert result["reverse KL"].pearson == pytest.approx(stats.pearsonr(kls, means).statistic)
    assert result["reverse KL"].spearman == pytest.approx(stats.spearmanr(kls, means).statistic)
    assert "forward KL" not in result, "it is the same for all"
    assert "Correlation with Rouge-L on dolly" in words_of(found)


def test_sets_without_rouge_are_one_table(folder: Path) -> None:
    for place, name in enumerate(("given-sft", "pairs-dpkd")):
        path = folder / name / "eval" / "arc"
        path.mkdir()
        scores = {
            "set": "arc",
            "metrics": {"acc": {"mean": 40.0 + place, "sd": None}},
            "better": {"acc": "higher"},
            "stderr": {"acc": 1.25},
            "titles": {"acc": "accuracy"},
        }
        (path / "scores.json").write_text(json.dumps(scores))
    found = read_experiment(folder)
    assert (sets_of(found, ranked=True), sets_of(found, ranked=False)) == (["dolly"], ["arc"])
    text = sweep_page(found)
    assert "arc: accuracy" in text
    assert '<td class="n best">41.00 ± 1.25</td>' in text


def test_choices_with_their_grid(folder: Path) -> None:
    words = words_of(read_experiment(folder))
    assert "train.lr = 0.2 at the edge of the grid" in words
    assert "lr-lr_0.1 0.1 3.000 lr-lr_0.2 0.2 4.000" in words
    record = json.loads((folder / "choices.json").read_text())
    trained(folder, "lr-lr_0.3", "kd", models={}, lr=0.3)
    record["lr"]["values"]["lr-lr_0.3"] = 1.0
    (folder / "choices.json").write_text(json.dumps(record))
    assert "at the edge" not in words_of(read_experiment(folder))


def test_the_page_is_whole(folder: Path) -> None:
    text = sweep_page(read_experiment(folder))
    found = Checked(text)
    assert found.open == []
    assert "not &lt;finite&gt;" in text
    words = " ".join(" ".join(found.words).split())
    anchors = [a["id"] for a in found.attributes("section")]
    assert anchors == [
        "overview", "ranking", "cost", "collapse", "reward", "samples", "choices", "curves", "settings", "technical",
    ]  # fmt: skip
    for name in (*ROUGE, "start", "teacher"):
        assert f"answer of {name}" in words, name
    first = words.index("the <reference>")
    assert (
        first < words.index("answer of teacher") < words.index("answer of pairs-dpkd") < words.index("3 more answers")
    )
    for told in (
        "teacher teacher (260K) · student start (169K)",
        "6 rows, 1 sampling seed;",
        "1. pairs-dpkd",
        "5. pairs-dpo",
        "35.00",
        "baseline",
        "mixed-opd left no time was left",
        "2.0 GiB",
    ):
        assert told in words, told
    assert str(folder.parent) not in text, "paths of this machine stay here"


def drawn_looks(colors: Sequence[int]) -> list[tuple[str, str, str]]:
    """Color, dashes and shape of the markers of each curve, as the drawing of a chart has them."""
    curves = tuple(Curve(f"run {c}", c, tuple(range(50)), tuple(c + s / 50 for s in range(50))) for c in colors)
    drawn = svg(LinePanel("key", "title", curves, by_run=True))
    shapes = dict(re.findall(r'<path id="(\w+)" d="([^"]*)"', drawn))
    line = r'style="fill: none; (?:stroke-dasharray: ([^;]*);[^"]*)?stroke: var\(--(c\d+)\)[^"]*"/>'
    marker = r'<use xlink:href="#(\w+)"[^>]*fill: var\(--c'
    return [
        (color, dashes, shapes[re.search(marker, rest)[1]])
        for dashes, color, rest in re.findall(rf"{line}(.*?)(?=<path d|$)", drawn, flags=re.DOTALL)
    ]


@pytest.mark.parametrize("colors", [range(6), range(5, 11), [3, 7, 11, 15], range(32), [0, 20, 40, 60]])
def test_the_curves_of_a_chart_look_different(colors: Sequence[int]) -> None:
    """Each in color, and each without it: by dashes and markers."""
    looks = drawn_looks(colors)
    assert [color for color, _, _ in looks] == [f"c{color % len(PALETTE)}" for color in colors]
    assert len({(dashes, shape) for _, dashes, shape in looks}) == len(looks)
    if len(colors) <= len(PALETTE) and max(colors) < len(PALETTE):
        assert len({color for color, _, _ in looks}) == len(looks)


def test_no_two_of_forty_runs_look_the_same_in_a_table() -> None:
    assert len({(color % len(PALETTE), color % len(GLYPHS)) for color in range(40)}) == 40
    assert len(set(GLYPHS)) == len(drawing.MARKERS) == len(GLYPHS)


def test_pairs_of_one_stage_have_colors_of_their_own(folder: Path) -> None:
    """The charts of the collapse and their legend, which is the table above them."""
    found = read_experiment(folder)
    own = {"pairs-dpkd": 2, "pairs-dpo": 3}
    for panel in collapse_panels(found):
        assert {curve.label: curve.color for curve in panel.curves} == own
    text = sweep_page(found)
    for name, color in own.items():
        assert f'<span class="run c{color} m{color % len(GLYPHS)}">{name}</span>' in text


def test_a_sweep_that_has_hardly_begun(tmp_path: Path) -> None:
    path = make_run(tmp_path / "s" / "a", rows=1)
    assert Checked(sweep_page(read_experiment(tmp_path / "s"))).open == []
    (path / "metrics.jsonl").unlink()
    assert Checked(sweep_page(read_experiment(tmp_path / "s"))).open == []


def test_the_command(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing, "DPI", 30)
    result = CliRunner().invoke(app, ["report", str(folder), "--baseline", str(folder / "given-kd")])
    assert result.exit_code == 0, result.output
    assert "<h1>evidence</h1>" in (folder / "report.html").read_text(encoding="utf-8")
    written = {file.stem for file in (folder / "report-figures").iterdir()}
    assert {"ranking-dolly", "cost-seconds-dolly", "collapse-logp-chosen", "reward-reward-mean-dolly"} <= written
    refused = CliRunner().invoke(app, ["report", str(folder / "start"), "--baseline", "x"])
    assert refused.exit_code != 0


def test_a_forest_has_an_interval_where_it_is(folder: Path) -> None:
    """The line of the baseline's interval: its ends have the distance of its numbers, on the axis of the means."""
    found = read_experiment(folder)
    panel = next(panel for panel in sweep_figures(found) if panel.key == "ranking-dolly")
    drawn = svg(panel)
    assert drawn.count("var(--muted)") > 2
    segments = re.findall(r'd="M ([\d.]+) ([\d.]+) \nL ([\d.]+) ([\d.]+) \n"[^>]*stroke: var\(--c(\d+)\)', drawn)
    spans = {(int(color), float(y)): float(right) - float(left) for left, y, right, _, color in segments}
    widths = [one.interval[1] - one.interval[0] for one in standings(found, "dolly") if one.rank and one.interval]
    drawn_widths = [width for _, width in sorted(spans.items(), key=lambda item: item[0][1])]
    scale = drawn_widths[0] / widths[0]
    assert drawn_widths == pytest.approx([width * scale for width in widths], rel=1e-3)
    assert math.isfinite(scale)
