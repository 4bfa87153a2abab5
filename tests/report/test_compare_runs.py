"""`dpkd compare`: values, tests, and every format read back."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from report_folders import add_scores, make_run
from typer.testing import CliRunner

from dpkd.cli.main import app
from dpkd.errors import SettingsError
from dpkd.report.comparison import compare
from dpkd.report.comparison_text import as_latex, as_markdown
from dpkd.report.reading import read_runs

BASE = {10: [20.0 + i for i in range(20)], 20: [21.0 + i for i in range(20)]}
BETTER = {seed: [value + 4 + 0.2 * (i % 3) for i, value in enumerate(own)] for seed, own in BASE.items()}


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    found = []
    for name, rouge in (("base", BASE), ("same", BASE), ("bet_ter&50%", BETTER)):
        path = make_run(tmp_path / name)
        add_scores(path / "eval", rouge)
        found.append(path)
    return found


def invoke(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["compare", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.output


def test_against_the_first_run_unless_another_is_named(paths: list[Path]) -> None:
    found = compare(read_runs(paths), "base")
    (table,) = found.sets
    cells = {run: own["rouge_l"] for run, own in table.cells.items()}
    assert cells["base"].mean == pytest.approx(30.0)
    assert cells["base"].sd == pytest.approx(2**-0.5)
    assert cells["base"].difference is None
    assert cells["same"].difference is not None
    assert cells["same"].difference.p == 1.0
    better = cells["bet_ter&50%"].difference
    assert better is not None
    assert better.mean == pytest.approx(4 + 0.2 * sum(i % 3 for i in range(20)) / 20)
    assert better.p < 0.001
    assert table.cells["same"]["nll"].difference is None, "no scores of rows, no test"
    assert found.notes == ()
    told = json.loads(invoke(*paths, "--baseline", paths[2], "--format", "json"))
    assert told["baseline"] == "bet_ter&50%"
    assert told["sets"][0]["cells"]["base"]["rouge_l"]["difference"]["high"] < 0


def test_a_baseline_that_is_not_among_the_runs_joins_them(paths: list[Path]) -> None:
    told = json.loads(invoke(paths[1], "--baseline", paths[0], "--format", "json"))
    assert told["runs"] == ["base", "same"]
    assert told["costs"]["base"] == {"seconds": 6.0, "tokens": 600.0, "peak_memory_mib": 503.0}


def test_rows_are_paired_by_id_and_averaged_over_seeds(tmp_path: Path) -> None:
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    add_scores(a / "eval", {10: [1.0, 5.0], 20: [3.0, 7.0]})
    add_scores(b / "eval", {10: [1.0, 5.0], 20: [3.0, 7.0]})
    for seed in (10, 20):  # the same rows in another order
        path = b / "eval" / "dolly" / f"predictions-{seed}.jsonl"
        path.write_text("\n".join(reversed(path.read_text().splitlines())) + "\n")
    (table,) = compare(read_runs([a, b]), "a").sets
    difference = table.cells["b"]["rouge_l"].difference
    assert difference is not None
    assert (difference.mean, difference.low, difference.high, difference.p) == (0.0, 0.0, 0.0, 1.0)


def test_different_rows_are_not_tested_and_that_is_said(tmp_path: Path) -> None:
    a, b, c = (make_run(tmp_path / name) for name in "abc")
    add_scores(a / "eval", {10: [1.0, 5.0]})
    add_scores(b / "eval", {30: [1.0, 5.0, 6.0]})
    add_scores(c / "eval", {10: [1.0, 2.0]}, name="vicuna")
    found = compare(read_runs([a, b, c]), "a")
    assert found.sets[0].cells["b"]["rouge_l"].difference is None
    notes = "\n".join(found.notes)
    assert "b and the baseline were scored on different rows" in notes
    assert "dolly: the runs were evaluated with different seeds" in notes
    assert "vicuna: the baseline a was not evaluated on it" in notes
    assert [table.name for table in found.sets] == ["dolly", "vicuna"]


def test_what_cannot_be_compared_is_refused(tmp_path: Path, paths: list[Path]) -> None:
    bare = make_run(tmp_path / "bare")
    with pytest.raises(SettingsError, match="no scores yet; evaluate first"):
        compare(read_runs([bare]), "bare")
    with pytest.raises(SettingsError, match=r"--metrics bleu: not among .*\(rouge_l, nll\)"):
        compare(read_runs(paths), "base", metrics=["bleu"])


def test_the_table_and_markdown_say_the_same(paths: list[Path]) -> None:
    table, markdown = invoke(*paths), as_markdown(compare(read_runs(paths), "base"))
    for told in ("base (baseline)", "30.00 ± 0.71 (p = 1.000)", "34.19 ± 0.71 (p < 0.001)", "training cost", "503 MiB"):
        assert told in table
        assert told in markdown.replace("\\*", "*")
    assert "34.19 ± 0.71 (p < 0.001)*" in table
    widths = {line.count("|") - line.count("\\|") for line in markdown.split("\n\n")[1].splitlines()}
    assert len(widths) == 1


@pytest.mark.parametrize("width", [80, 200])
def test_the_table_fits_the_terminal(paths: list[Path], monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    for path in paths:
        (file,) = path.glob("eval/*/scores.json")
        scores = json.loads(file.read_text())
        values = dict.fromkeys(("exact_match", "forward_kl", "reverse_kl", "words"), scores["metrics"]["rouge_l"])
        file.write_text(json.dumps({**scores, "metrics": {**scores["metrics"], **values}}))
    text = invoke(*paths, "--metrics", "all")
    assert max(map(len, text.splitlines())) <= width
    for told in ("Rouge-L ↑", "exact match ↑", "forward KL ↓", "reverse KL ↓", "words per answer", "34.19 ± 0.71 (p <"):
        assert told in text
    assert text.count("bet_ter&50%") == (3 if width == 80 else 2)


def test_the_baseline_is_a_run_with_scores(tmp_path: Path, paths: list[Path]) -> None:
    """As of a sweep whose first stage is not evaluated."""
    text = invoke(make_run(tmp_path / "a-first-stage"), *paths)
    assert "base (baseline)" in text
    assert "against base over rows" in " ".join(text.split())


def test_csv_reads_back_with_full_precision(paths: list[Path], tmp_path: Path) -> None:
    target = tmp_path / "out" / "table.csv"
    assert str(target) in invoke(*paths, "--format", "csv", "--output", target)
    rows = list(csv.DictReader(io.StringIO(target.read_text(encoding="utf-8"))))
    assert len(rows) == 3 * 2 + 3 * 3
    (row,) = [row for row in rows if row["run"] == "bet_ter&50%" and row["metric"] == "rouge_l"]
    assert float(row["mean"]) == pytest.approx(30 + 4 + 0.2 * sum(i % 3 for i in range(20)) / 20, abs=1e-12)
    assert (row["rows"], row["seeds"], row["baseline"]) == ("20", "2", "base")
    assert {row["set"] for row in rows} == {"dolly", "(training)"}


def test_latex_is_escaped(paths: list[Path]) -> None:
    text = as_latex(compare(read_runs(paths), "base"))
    assert r"bet\_ter\&50\% & 20 & 2 & 34.19 $\pm$ 0.71 (p $<$ 0.001)* & 2.000 \\" in text
    code = "\n".join(line for line in text.splitlines() if not line.startswith("%"))
    assert code.isascii(), [c for c in code if not c.isascii()]
    assert code.count("\\begin{tabular}") == code.count("\\end{tabular}") == 2


HOSTILE = "dolly\n\\immediate\\write18{touch /tmp/owned} \x1b[31m <b>=1+1"


@pytest.fixture
def hostile(tmp_path: Path) -> list[Path]:
    """Runs and a set with names that each format would take for something else than text."""
    found = []
    for name in ("=cmd()", "@b", "<i>c|d", "-e"):
        path = make_run(tmp_path / name)
        add_scores(path / "eval", {10: [1.0, 2.0 + len(found)]}, name="set")
        (file,) = path.glob("eval/*/scores.json")
        file.write_text(json.dumps({**json.loads(file.read_text()), "set": HOSTILE, "seeds": [10 + len(found)]}))
        found.append(path)
    return found


def test_latex_has_no_command_of_a_name(hostile: list[Path]) -> None:
    """After a line break a note in a comment would be a command again."""
    text = as_latex(compare(read_runs(hostile), "=cmd()"))
    notes = [line for line in text.splitlines() if "different seeds" in line]
    assert notes
    assert all(line.startswith("% ") for line in notes)
    code = "\n".join(line for line in text.splitlines() if not line.startswith("%"))
    assert "write18" in code
    assert "\\write18" not in code
    assert "\\immediate" not in code
    assert "\x1b" not in text


def test_csv_has_no_formula(hostile: list[Path]) -> None:
    text = invoke(*hostile, "--format", "csv")
    cells = [cell for row in csv.reader(io.StringIO(text)) for cell in row]
    assert "'=cmd()" in cells
    assert "'@b" in cells
    assert not [cell for cell in cells if cell[:1] in ("=", "+", "@") or (cell[:1] == "-" and not is_number(cell))]


def is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def test_markdown_has_no_html(hostile: list[Path]) -> None:
    html = (
        MarkdownIt("commonmark", {"html": True}).enable("table").render(as_markdown(compare(read_runs(hostile), "@b")))
    )
    assert "<i>" not in html
    assert "<b>" not in html
    assert "&lt;i&gt;c|d" in html
    assert "(baseline)" in html


@pytest.mark.parametrize("form", ["table", "markdown", "latex"])
def test_no_format_prints_an_escape_sequence(hostile: list[Path], form: str) -> None:
    assert "\x1b" not in invoke(*hostile, "--format", form)


@pytest.fixture
def seeded(tmp_path: Path) -> list[Path]:
    """Three runs of one loss with seeds of their own, and one of another."""
    found = []
    for name, loss, seed, shift in (
        ("kd-seed1", "kd", 1, 0.0),
        ("sft-1", "sft", 1, -9.0),
        ("kd-seed2", "kd", 2, 1.0),
        ("kd-seed3", "kd", 3, 5.0),
    ):
        path = make_run(tmp_path / name, loss)
        config = path / "config.resolved.yaml"
        config.write_text(config.read_text().replace("seed: 10", f"seed: {seed}\noutput: runs/{name}"))
        add_scores(path / "eval", {10: [value + shift + i % 2 for i, value in enumerate(BASE[10])]})
        found.append(path)
    return found


def test_runs_that_differ_in_their_seed_alone_are_one_line(seeded: list[Path]) -> None:
    """Means 30, 31 and 35 (29.5 + ½ + shift): 32 ± √7, and the test is of each row's mean over the three."""
    told = json.loads(invoke(*seeded, "--baseline", seeded[1], "--format", "json"))
    assert told["runs"] == ["kd (3 seeds)", "sft-1"]
    cell = told["sets"][0]["cells"]["kd (3 seeds)"]["rouge_l"]
    assert cell["mean"] == pytest.approx(32.0)
    assert cell["sd"] == pytest.approx(7**0.5)
    assert cell["difference"]["mean"] == pytest.approx(32.0 - 21.0)
    assert told["costs"]["kd (3 seeds)"] == told["costs"]["sft-1"], "of one run, on average"
    pooled = json.loads(invoke(*seeded, "--baseline", seeded[2], "--format", "json"))
    assert pooled["baseline"] == "kd (3 seeds)", "a member's name is its group's"


def test_each_run_has_a_line_where_that_is_asked_for(seeded: list[Path]) -> None:
    told = json.loads(invoke(*seeded, "--each", "--format", "json"))
    assert told["runs"] == [path.name for path in seeded]
