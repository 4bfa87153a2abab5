"""Runs whose student and teacher have different tokenizers, through the door that the command line uses."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
from rich.console import Console
from toy_runs import assert_same_model

from dpkd.api import SamplingSettings
from dpkd.errors import DpkdError
from dpkd.evaluation.evaluator import EvaluationSettings, Evaluator
from dpkd.models.settings import ModelSettings, TeacherSettings
from dpkd.run_metrics import read_metrics
from dpkd.train import run
from dpkd.train.cache import cache
from dpkd.train.plan import dry_run
from dpkd.train.resume import resume_folder


def test_a_run_goes_on_bit_for_bit_and_logs_no_kl(across, quiet, stops):
    changes = {
        "text.source": "mixed",
        "text.mix": {"student": 0.5, "teacher": 0.5},
        "train.steps": 4,
        "student.lora": {"r": 2},
    }
    whole = run.train(across("uld", changes, swap=True), console=quiet)
    with stops():
        run.train(across("uld", changes, "again", swap=True), console=quiet)
    again = resume_folder(whole.path.with_name("again"), console=quiet)
    assert_same_model(whole, again)
    lines = read_metrics(whole.metrics)
    assert not {key for line in lines for key in line if key.startswith(("kl/", "reward/", "agreement", "nll/teacher"))}
    assert all("spans/covered" in line for line in lines)
    assert any(line["spans/covered"] == 1 for line in lines)  # whatever this student draws is text


@pytest.mark.parametrize("loss", ["seqkd", "dpkd-simpo"])
def test_text_of_the_teacher_is_told_again_in_the_students_tokens(loss, across, quiet, tmp_path):
    folder = run.train(across(loss, {"text.store": str(tmp_path / "store")}), console=quiet)
    (file,) = (tmp_path / "store").rglob("responses.jsonl")
    stored = [json.loads(line)["text"] for line in file.read_text(encoding="utf-8").splitlines()]
    rows = [json.loads(line) for line in folder.samples.read_text(encoding="utf-8").splitlines()]
    seen = [r["text"] for row in rows for r in row["responses"] if r["writer"] == "teacher"]
    assert seen
    assert set(seen) <= set(stored)


def test_a_development_set_needs_no_common_tokens(across, toy, quiet):
    dev = {"path": str(toy / "data.jsonl"), "limit": 3, "metric": "bits_per_byte", "max_new_tokens": 2}
    folder = run.train(across("uld", {"dev": dev}), console=quiet)
    (line,) = (json.loads(line) for line in (folder.path / "dev.jsonl").read_text(encoding="utf-8").splitlines())
    assert line["bits_per_byte"] > 0
    assert "forward_kl" not in line


def test_a_store_is_refused(across, quiet, tmp_path):
    with pytest.raises(DpkdError, match="their tokenizers differ"):
        cache(across("uld"), tmp_path / "cache", kind="topk", k=300, console=quiet)


def test_with_equal_tokenizers_a_row_is_a_token(settings_of, quiet):
    folder = run.train(settings_of("uld"), console=quiet)
    line = read_metrics(folder.metrics)[0]
    assert "spans/covered" not in line
    assert line["part/nll"] == pytest.approx(line["nll/student"])
    assert line["kl/forward"] > 0


def test_gold_with_equal_tokenizers_is_the_jsd(settings_of, quiet):
    one, other = (
        read_metrics(run.train(settings_of(loss, {"text.source": "dataset"}), console=quiet).metrics)
        for loss in ("gold", "jsd")
    )
    assert [line["loss/main"] for line in one] == pytest.approx([line["loss/main"] for line in other], rel=1e-6)
    assert [line["gradient_norm"] for line in one] == pytest.approx([line["gradient_norm"] for line in other], rel=1e-5)


@pytest.mark.parametrize(
    ("loss", "changes", "why"),
    [
        ("kd", {}, "the loss kd compares the two models token by token"),
        ("dpkd", {}, "the loss dpkd compares"),
        ("opd", {}, "the loss opd compares"),
        ("uld", {"terms.extra": {"more": {"loss": "fkl"}}}, "the loss fkl compares"),
        ("uld", {"text.source": "student", "text.teacher_mix": 0.2}, "text.teacher_mix mixes"),
        ("uld", {"text.source": "student", "text.teacher_veto": 5}, "text.teacher_veto lets"),
        ("hidden-cosine", {}, "the loss hidden-cosine compares"),
        ("uld", {"terms.pretrain": {"weight": 1.0, "kd_ratio": 0.5, "corpus": {"path": "CORPUS"}}}, "kd_ratio"),
    ],
)
def test_what_needs_one_tokenizer_is_refused_early(loss, changes, why, across, toy, quiet):
    if "terms.pretrain" in changes:
        changes["terms.pretrain"]["corpus"]["path"] = str(toy / "corpus.txt")
    resolved = across(loss, changes)
    for way in (dry_run, run.train):
        with pytest.raises(DpkdError, match=rf"different tokenizers, but .*{why}.*works? across tokenizers"):
            way(resolved, console=quiet)
    assert not Path(resolved.settings.output).exists()


def test_the_dry_run_says_so(across):
    text = io.StringIO()
    dry_run(across("uld"), console=Console(file=text, width=200))
    assert "tokenizers differ: both models are compared at aligned spans of text" in text.getvalue()
    assert "aligned spans; 97 of the teacher's 105 tokens are among the student's 257" in text.getvalue()


def test_a_teacher_that_reads_too_little_is_refused(across, foreign, quiet, tmp_path):
    short = tmp_path / "short"
    shutil.copytree(foreign, short)
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 4}))
    with pytest.raises(DpkdError, match=r"tokens in the teacher's tokenizer, and the teacher reads 4"):
        dry_run(across("uld", {"teacher.model": str(short)}), console=quiet)


def test_an_evaluation_leaves_the_teacher_out_and_says_so(across, toy, foreign):
    bench = Evaluator(ModelSettings(model=str(toy / "teacher")), TeacherSettings(model=str(foreign)))
    said: list[str] = []
    settings = EvaluationSettings(SamplingSettings(max_new_tokens=2), seeds=(1,))
    data = across("uld").settings.data.model_copy(update={"limit": 2})
    result = bench.evaluate("x", data, settings, say=said.append)
    assert "bits_per_byte" in result.metrics
    assert not {"forward_kl", "teacher_nll", "reward_sum"} & set(result.metrics)
    assert any("has another tokenizer: divergences from it" in line for line in said)
    assert result.facts["teacher"] is None
