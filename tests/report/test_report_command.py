"""`dpkd report`, a sweep's folder, its PNG files, and the model card's scores."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from report_folders import add_dev, add_scores, make_run
from typer.testing import CliRunner

from dpkd.cli.main import app
from dpkd.report import drawing
from dpkd.report.card import rescore
from dpkd.report.reading import read_runs


def test_the_page_goes_into_the_run_and_of_several_where_one_says(tmp_path: Path) -> None:
    paths = [make_run(tmp_path / name) for name in ("a", "b")]
    runner = CliRunner()
    assert runner.invoke(app, ["report", str(paths[0]), "--no-figures"]).exit_code == 0
    assert (paths[0] / "report.html").is_file()
    target = tmp_path / "both.html"
    result = runner.invoke(app, ["report", *map(str, paths), "--output", str(target), "--no-figures"])
    assert result.exit_code == 0, result.output
    assert "2 runs compared" in target.read_text(encoding="utf-8")
    assert not (tmp_path / "both-figures").exists()


def test_a_sweeps_folder_stands_for_its_runs(tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    for name in ("kd", "sft"):
        add_scores(make_run(sweep / name) / "eval", {10: [1.0, 2.0]})
    (sweep / "kd.yaml").write_text("train.lr: 1\n")
    result = CliRunner().invoke(app, ["report", str(sweep), "--no-figures"])
    assert result.exit_code == 0, result.output
    assert "<h1>sweep</h1>" in (sweep / "report.html").read_text(encoding="utf-8")
    told = CliRunner().invoke(app, ["compare", str(sweep)]).output
    assert "kd (baseline)" in told
    assert "sft" in told


def test_png_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing, "DPI", 40)
    path = make_run(tmp_path / "a")
    add_dev(path)
    add_scores(path / "eval", {10: [20.0, 30.0], 20: [22.0, 31.0]})
    written = drawing.write_figures(drawing.figures(read_runs([path])), tmp_path / "png")
    names = {file.name for file in written}
    assert {"kl.png", "reward-against-kl.png", "length-dolly-rouge-l.png", "dev-rouge.png"} <= names
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in written)
    assert "matplotlib.pyplot" not in sys.modules, "pyplot keeps figures and picks a backend for the whole process"


def test_a_link_in_the_place_of_a_figure_is_replaced_and_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The figures go into the run's own folder, which may be a stranger's."""
    monkeypatch.setattr(drawing, "DPI", 40)
    path = make_run(tmp_path / "a")
    (tmp_path / "victim").write_text("mine")
    (path / "report-figures").mkdir()
    for place in (path / "report.html", path / "report-figures/kl.png"):
        place.symlink_to(tmp_path / "victim")
    result = CliRunner().invoke(app, ["report", str(path)])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "victim").read_text() == "mine"
    assert (path / "report-figures/kl.png").read_bytes().startswith(b"\x89PNG")


def test_rescore_writes_the_scores_and_leaves_the_rest(tmp_path: Path) -> None:
    path = make_run(tmp_path / "a")
    before = (path / "README.md").read_text(encoding="utf-8")
    assert not rescore(path), "no scores yet"
    assert (path / "README.md").read_text(encoding="utf-8") == before
    add_scores(path / "eval", {10: [20.0, 30.0], 20: [22.0, 31.0]})
    assert rescore(path)
    text = (path / "README.md").read_text(encoding="utf-8")
    assert "| dolly | Rouge-L | 25.75 ± 1.06 | 2 | 2 |" in text
    assert "| dolly | NLL | 2.00 | 2 |  |" in text
    assert text.index("## Scores") < text.index("## How to load it") < text.rindex("## Scores"), "one is code"
    start, end = text.index("## Scores"), text.index("## How to load it")
    head = text.index("# run\n")
    assert text[head:start] + text[end:] == before[before.index("# run\n") :]
    assert ModelCard(text).data.license == "mit", "what people wrote into the head stays"
    (result,) = ModelCard(text).data.eval_results[:1]
    assert (result.dataset_name, result.metric_type, result.metric_value) == ("dolly", "rouge_l", 25.75)
    assert rescore(path)
    assert (path / "README.md").read_text(encoding="utf-8") == text


def test_rescore_replaces_older_scores(tmp_path: Path) -> None:
    path = make_run(tmp_path / "a")
    add_scores(path / "eval", {10: [20.0]})
    rescore(path)
    add_scores(path / "eval", {10: [40.0]}, name="vicuna")
    rescore(path)
    text = (path / "README.md").read_text(encoding="utf-8")
    assert text.count("## Scores") == 2, "the new section, and the line in a code fence"
    assert "| vicuna | Rouge-L | 40.00 | 1 | 1 |" in text
    (path / "README.md").write_text("---\n[: no YAML\n---\n# mine\n")
    assert not rescore(path), "a head that cannot be read is left alone"
    assert "# mine" in (path / "README.md").read_text()
    (path / "README.md").unlink()
    assert not rescore(path), "no card"
