"""What a run says and refuses before it loads a weight, and what it refuses to continue."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from dpkd.errors import DpkdError, Stopped
from dpkd.train import run
from dpkd.train.build import _check_sharding
from dpkd.train.plan import dry_run
from dpkd.train.resume import resume_folder


@pytest.fixture
def shown():
    """A console, and what was printed on it."""
    buffer = io.StringIO()
    return Console(file=buffer, width=200), lambda: buffer.getvalue()


@pytest.fixture
def both(shown):
    """The dry run and the run itself: they must refuse the same."""
    return [
        lambda resolved: dry_run(resolved, console=shown[0]),
        lambda resolved: run.train(resolved, console=shown[0]),
    ]


def _refused(both, resolved, match):
    for way in both:
        with pytest.raises(DpkdError, match=match):
            way(resolved)
    assert not list(Path(resolved.settings.output).glob("*"))  # and leaves no folder behind


def _write(path: Path, rows: list[dict[str, object] | str]) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def test_skipped_rows_are_counted_said_and_kept(settings_of, shown, tmp_path):
    data = _write(tmp_path / "d.jsonl", [{"prompt": "a", "response": "b"}, "{broken", {"prompt": "c"}, "{torn"])
    console, text = shown
    folder = run.train(settings_of("sft", {"data.path": data, "data.on_bad_row": "skip"}), console=console)
    assert "skipped 2: not JSON (first: d.jsonl:2)" in text()
    assert "skipped 1: missing field (first: d.jsonl:3)" in text()
    assert json.loads(folder.facts.read_text())["data"]["skipped"] == {"not JSON": 2, "missing field": 1}


@pytest.mark.parametrize(
    ("loss", "changes", "match"),
    [
        ("sft", {"data.path": "LONG", "data.max_tokens": 4096, "student.model": "GPT2"}, "longest sequence has 30"),
        (
            "sft",
            {
                "terms.pretrain": {"weight": 1.0, "corpus": {"path": "CORPUS", "max_tokens": 512}},
                "student.model": "GPT2",
            },
            r"corpus.max_tokens: is 512, but the student reads at most 256",
        ),
        ("sft", {"terms.pretrain": {"weight": 1.0, "corpus": {"path": "nothing.txt"}}}, "there is no file nothing.txt"),
        ("kd", {"student.layers": [0, 9]}, r"\[9\] do not exist; the layers of the teacher are 0 to 3"),
    ],
)
def test_what_cannot_work_is_refused_early(loss, changes, match, settings_of, toy, both, tmp_path):
    long = _write(tmp_path / "long.jsonl", [{"prompt": "a", "response": "b" * 299}])
    paths = {"LONG": long, "GPT2": str(toy / "gpt2"), "CORPUS": str(toy / "corpus.txt")}

    def filled(value):
        if isinstance(value, dict):
            return {key: filled(part) for key, part in value.items()}
        return paths.get(value, value) if isinstance(value, str) else value

    changes = filled(changes)
    if "student.model" in changes:
        changes |= {"student.init": "pretrained", "student.layers": None}
    _refused(both, settings_of(loss, changes), match)


def test_other_tokenizers_are_refused_early(settings_of, toy, both, tmp_path):
    from transformers import AutoTokenizer

    other = tmp_path / "other"
    shutil.copytree(toy / "gpt2", other)
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(other)
    changes = {"student.init": "pretrained", "student.layers": None, "student.model": str(other)}
    _refused(both, settings_of("kd", changes), "different tokenizers")


def test_a_folder_with_something_in_it_is_refused_early(settings_of, both):
    resolved = settings_of("sft")
    folder = Path(resolved.settings.output)
    folder.mkdir(parents=True)
    (folder / "thesis.tex").write_text("years of micro_batch")
    for way in both:
        with pytest.raises(DpkdError, match=r"holds thesis.tex; expected a folder that is new or empty"):
            way(resolved)


def test_a_warm_up_longer_than_the_run_is_said(settings_of, shown):
    console, text = shown
    dry_run(settings_of("sft", {"train.warmup_steps": 100}), console=console)
    assert "warmup_steps is 100, but there are only 2 steps" in text()


def test_text_is_cut_to_the_student_that_reads_less(settings_of, toy, quiet):
    """GPT-2 reads 256 tokens; the Llama teacher would write 300 to it."""
    changes = {
        "student.init": "pretrained",
        "student.layers": None,
        "student.model": str(toy / "gpt2"),
        "train.steps": 1,
        "text.source": "teacher",
        "text.teacher_sampling.max_new_tokens": 300,
        "train.batch_size": 24,
    }
    folder = run.train(settings_of("sft", changes), console=quiet)
    line = json.loads(folder.metrics.read_text().splitlines()[-1])
    assert line["text/truncated_share"] > 0
    changes |= {"text.source": "student", "text.sampling.max_new_tokens": 300, "output": f"{folder.path}-2"}
    run.train(settings_of("rkl", changes), console=quiet)


def test_changed_data_or_teacher_is_not_continued(settings_of, toy, quiet, stops, tmp_path):
    data = _write(tmp_path / "d.jsonl", [{"prompt": "a", "response": "b"}, {"prompt": "c", "response": "d"}])
    teacher = tmp_path / "teacher"
    shutil.copytree(toy / "teacher", teacher)
    resolved = settings_of("kd", {"data.path": data, "teacher.model": str(teacher)}, teacher=None)
    with stops():
        run.train(resolved, console=quiet)
    folder = Path(resolved.settings.output)
    _write(tmp_path / "d.jsonl", [{"prompt": "c", "response": "d"}, {"prompt": "a", "response": "b"}])
    with pytest.raises(DpkdError, match=r"since it began, the data \(data.path\) changed"):
        resume_folder(folder, console=quiet)
    _write(tmp_path / "d.jsonl", [{"prompt": "a", "response": "b"}, {"prompt": "c", "response": "d"}])
    weights = teacher / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-40:] = bytes(40)
    weights.write_bytes(content)
    with pytest.raises(DpkdError, match=r"the teacher \(teacher.model\) changed"):
        resume_folder(folder, console=quiet)
    shutil.copy(toy / "teacher" / "model.safetensors", weights)
    resume_folder(folder, console=quiet)


def test_the_corpus_is_in_the_facts(settings_of, toy, shown):
    console, text = shown
    corpus = {"path": str(toy / "corpus.txt"), "max_tokens": 16}
    folder = run.train(settings_of("sft", {"terms.pretrain": {"weight": 0.5, "corpus": corpus}}), console=console)
    facts = json.loads(folder.facts.read_text())["corpus"]
    assert facts["documents"] == 12
    assert len(facts["fingerprint"]) == 64
    assert "12 documents" in text()


def test_pairs_that_are_all_equal_are_said_once(settings_of, toy, shown):
    """Greedy teacher and greedy student of all its layers write the same."""
    console, text = shown
    greedy = {"temperature": 0.0, "max_new_tokens": 4}
    changes = {"student.layers": 4, "text.sampling": greedy, "text.teacher_sampling": greedy}
    run.train(settings_of("dpkd", {**changes, "train.lr": 1e-12, "train.min_lr": 0.0}), console=console)
    assert text().count("the two responses of every pair are equal") == 1


def test_an_interrupt_while_the_teacher_writes_says_how_to_go_on(settings_of, quiet, monkeypatch):
    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr("dpkd.api.source_base.SourceBase.prepare", interrupted)
    with pytest.raises(Stopped, match="what it wrote is kept; continue with: dpkd train --resume") as caught:
        run.train(settings_of("seqkd"), console=quiet)
    assert caught.value.exit_code == 130


def test_fsdp_1_is_refused():
    with pytest.raises(DpkdError, match="dpkd needs FSDP 2"):
        _check_sharding(SimpleNamespace(state=SimpleNamespace(fsdp_plugin=SimpleNamespace(fsdp_version=1))))


def test_deepspeed_that_is_not_installed_is_named(settings_of, quiet, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(DpkdError, match=r"launched with DeepSpeed, which cannot be imported.*pip install 'dpkd\[deep"):
        run.train(settings_of("kd"), console=quiet)
