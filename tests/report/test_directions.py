"""Whether high or low is better: written with the scores, read by the comparison and by the page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from report_folders import add_scores, make_run

from dpkd.api import Answers, MetricSpec
from dpkd.errors import DpkdError
from dpkd.evaluation.evaluator import metric_specs
from dpkd.evaluation.results import Evaluation, score
from dpkd.plugins import load_registry
from dpkd.report.comparison import compare
from dpkd.report.comparison_text import as_json, grids
from dpkd.report.names import better_by_name
from dpkd.report.page import page
from dpkd.report.reading import better_of, read_runs
from dpkd.train.dev import direction_of

ROUGE = {10: [20.0, 21.0]}


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    """Two runs with a stranger's metric, of which the second has less."""
    found = []
    for name, typos in (("many", 7.0), ("few", 3.0)):
        path = make_run(tmp_path / name)
        add_scores(path / "eval", ROUGE)
        found.append(path)
        change(path, lambda scores, typos=typos: scores["metrics"].update(typos={"mean": typos, "sd": None}))
    return found


SPECS = metric_specs(load_registry({}))


def change(path: Path, edit) -> None:
    (file,) = path.glob("eval/*/scores.json")
    scores = json.loads(file.read_text(encoding="utf-8"))
    edit(scores)
    file.write_text(json.dumps(scores), encoding="utf-8")


def say(path: Path, better: str) -> None:
    change(path, lambda scores: scores.update(better={"typos": better, "rouge_l": "higher"}))


def heads(paths: list[Path]) -> tuple[str, ...]:
    return grids(compare(read_runs(paths), "many", metrics=("all",)))[0].heads


def test_a_metric_tells_its_direction_to_scores_json():
    spec = MetricSpec(
        "typos", "typos", "lower", "Typos.", per_row=lambda a: [2.0 for _ in a.predictions], title="spelling"
    )
    answers = Answers(["a", "b"], [["x"], ["y"]], [1, 1], [False, False])
    metrics, buckets, _ = score({1: answers}, {"typos": spec})
    assert {bucket.metrics["typos"].better for bucket in buckets if bucket.rows} == {"lower"}
    told = Evaluation(2, (1,), metrics).as_dict()
    assert (told["better"], told["titles"]) == ({"typos": "lower"}, {"typos": "spelling"})


def test_the_title_of_a_strangers_metric_goes_where_its_scores_go(paths):
    for path in paths:
        change(path, lambda scores: scores.update(titles={"typos": "spelling mistakes"}))
    assert "spelling mistakes" in heads(paths)
    assert ">spelling mistakes<" in page(read_runs(paths))


@pytest.mark.parametrize(("better", "head"), [("lower", "typos ↓"), ("higher", "typos ↑"), ("", "typos")])
def test_the_comparison_has_the_arrow_that_the_scores_say(paths, better, head):
    for path in paths:
        say(path, better)
    assert head in heads(paths)
    assert "Rouge-L ↑" in heads(paths)
    assert (
        json.loads(as_json(compare(read_runs(paths), "many", metrics=("all",))))["sets"][0]["better"]["typos"] == better
    )


def test_scores_that_do_not_say_it_go_by_the_name(paths):
    assert {"Rouge-L ↑", "NLL ↓", "typos"} <= set(heads(paths))


def test_where_scores_do_not_agree_neither_is_better(paths):
    say(paths[0], "lower")
    say(paths[1], "higher")
    assert "typos" in heads(paths)
    runs = read_runs(paths)
    assert better_of("typos", [next(iter(run.evaluations.values())) for run in runs]) == ""


def test_the_page_marks_the_best_of_a_strangers_metric(paths):
    def best() -> list[str]:
        row = next(row for row in page(read_runs(paths)).split("<tr") if ">typos<" in row)
        return [cell for cell in row.split("<td")[1:] if "best" in cell]

    assert best() == []
    for path in paths:
        say(path, "lower")
    (cell,) = best()
    assert ">3<" in cell or ">3.0" in cell


def test_names_specs_and_dev_agree_on_directions():
    for metric, spec in SPECS.items():
        assert better_by_name(metric) == spec.better
        if spec.better:
            assert direction_of(metric, SPECS) == (1 if spec.better == "higher" else -1)
        else:
            with pytest.raises(DpkdError, match="is neither better high nor low"):
                direction_of(metric, SPECS)
