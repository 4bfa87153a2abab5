"""Several teachers: each prompt by its own, a mixture, and a context that the student does not see."""

from __future__ import annotations

import json

import pytest
import torch
from test_invariants import gradients
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpkd.api import Wants
from dpkd.data.batches import Layout, TokenSequence, collate
from dpkd.errors import DpkdError, SettingsError
from dpkd.run_metrics import read_metrics
from dpkd.teachers.several import SeveralSettings, SeveralTeachers
from dpkd.train import run
from dpkd.train.plan import make_plan
from dpkd.train.progress import Display


@pytest.fixture(scope="module")
def other(toy, tmp_path_factory):
    """A second teacher of the same tokenizer."""
    folder = tmp_path_factory.mktemp("other")
    model = AutoModelForCausalLM.from_pretrained(toy / "teacher")
    with torch.no_grad():
        model.lm_head.weight.mul_(-0.5)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(toy / "teacher").save_pretrained(folder)
    return folder


def _opened(toy, **teachers):
    tokenizer = AutoTokenizer.from_pretrained(toy / "teacher")
    one = SeveralTeachers(SeveralSettings.model_validate({"teachers": teachers}))
    one.check(tokenizer)
    one.load(torch.device("cpu"))
    one.share(tokenizer, 257)
    return one, tokenizer


def _probabilities(folder, sequence, context=()):
    """By a plain forward of transformers: `[T, V]` at each response token."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    prompt, response = sequence
    with torch.no_grad():
        logits = model(torch.tensor([[*context, *prompt, *response]])).logits[0]
    return logits[-len(response) - 1 : -1].double().softmax(-1)


def _sequences(tokenizer):
    texts = [("red sum", "cat"), ("blue", "dogs"), ("a sum", "x")]
    return [TokenSequence(*(tuple(tokenizer(text)["input_ids"]) for text in pair)) for pair in texts]


@pytest.mark.parametrize("layout", [Layout(), Layout(packed=True)])
def test_each_prompt_is_scored_by_its_teacher(toy, other, layout):
    teacher, tokenizer = _opened(toy, sums={"model": str(other), "when": "sum$"}, rest={"model": str(toy / "teacher")})
    sequences = _sequences(tokenizer)
    output = teacher.score(collate(sequences, pad_id=256, layout=layout), Wants(4, logits=True))
    folders = [other, toy / "teacher", other]
    expected = torch.cat([_probabilities(folder, s) for folder, s in zip(folders, sequences, strict=True)])
    torch.testing.assert_close(output.logits(slice(None)).double().softmax(-1), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(output.logits(slice(2, 6)).double().softmax(-1), expected[2:6], atol=1e-5, rtol=1e-4)
    targets = torch.tensor([i for s in sequences for i in s.response_ids])
    given = expected.gather(-1, targets[:, None])[:, 0].log().float()
    torch.testing.assert_close(output.logps(), given, atol=1e-4, rtol=1e-4)
    assert teacher.statistics() == {"teacher/sums/tokens": 4.0, "teacher/rest/tokens": 4.0}


def test_a_mixture_averages_probabilities(toy, other):
    teacher, tokenizer = _opened(
        toy, one={"model": str(toy / "teacher"), "weight": 3}, two={"model": str(other), "weight": 1}
    )
    sequences = _sequences(tokenizer)
    output = teacher.score(collate(sequences, pad_id=256), Wants(4, logits=True))
    one, two = (torch.cat([_probabilities(f, s) for s in sequences]) for f in (toy / "teacher", other))
    found = output.logits(slice(None)).double().softmax(-1)
    torch.testing.assert_close(found, 0.75 * one + 0.25 * two, atol=1e-5, rtol=1e-4)


def test_a_context_is_read_by_its_teacher_only(toy):
    teacher, tokenizer = _opened(toy, only={"model": str(toy / "teacher"), "context": "hint: "})
    sequences = _sequences(tokenizer)
    context = tokenizer("hint: ")["input_ids"]
    output = teacher.score(collate(sequences, pad_id=256), Wants(4, logits=True))
    expected = torch.cat([_probabilities(toy / "teacher", s, context) for s in sequences])
    torch.testing.assert_close(output.logits(slice(None)).double().softmax(-1), expected, atol=1e-5, rtol=1e-4)


def _rows(path, teachers):
    rows = [
        {"prompt": f"{word} sum", "response": "cat", "domain": teacher}
        for word, teacher in zip(["red", "blue", "old", "new"], teachers, strict=True)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_a_column_of_the_data_names_the_teacher_of_each_row(settings_of, toy, other, quiet, tmp_path):
    members = {"math": {"model": str(other)}, "chat": {"model": str(toy / "teacher")}}
    settings = _student(toy, members)
    settings["teacher.settings"]["column"] = "domain"
    settings["data.path"] = _rows(tmp_path / "rows.jsonl", ["math", "chat", "chat", "math"])
    changes = {"student.dropout": "off", "dev.path": settings["data.path"], "dev.max_new_tokens": 2}
    resolved = settings_of("kd", {**settings, **changes, "text.source": "student", "train.steps": 1}, teacher=None)
    tokens = dict.fromkeys(members, 0)
    kept = SeveralTeachers._teacher_of

    def watched(self, prompt):
        found = kept(self, prompt)
        expected = "math" if self._tokenizer.decode(list(prompt)).split()[0] in ("red", "new") else "chat"
        assert found == expected
        tokens[found] += 1
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SeveralTeachers, "_teacher_of", watched)
        (line, *_) = read_metrics(run.train(resolved, console=quiet).metrics)
    assert all(tokens.values())
    assert line["teacher/math/tokens"] > 0
    assert line["teacher/chat/tokens"] > 0


@pytest.mark.parametrize(
    ("teachers", "words"),
    [
        (["math", "chat", "law", "math"], r"rows.jsonl:3: `domain` names the teacher 'law'; there are math, chat"),
        (["math", "chat", None, "math"], r"missing field: `domain` is null"),
    ],
)
def test_a_row_whose_teacher_is_not_known_is_named(settings_of, toy, quiet, tmp_path, teachers, words):
    settings = _student(toy, {"math": {"model": str(toy / "teacher")}, "chat": {"model": str(toy / "teacher")}})
    settings["teacher.settings"]["column"] = "domain"
    settings["data.path"] = _rows(tmp_path / "rows.jsonl", teachers)
    with pytest.raises(DpkdError, match=words):
        make_plan(settings_of("kd", settings, teacher=None), Display(quiet))


def test_two_rows_of_one_prompt_have_one_teacher(settings_of, toy, quiet, tmp_path):
    settings = _student(toy, {"math": {"model": str(toy / "teacher")}, "chat": {"model": str(toy / "teacher")}})
    settings["teacher.settings"]["column"] = "domain"
    path = tmp_path / "rows.jsonl"
    text = "".join(json.dumps({"prompt": "a", "response": "b", "domain": name}) + "\n" for name in ("math", "chat"))
    path.write_text(text, encoding="utf-8")
    settings["data.path"] = str(path)
    with pytest.raises(DpkdError, match="and another row with the same prompt 'math'"):
        make_plan(settings_of("kd", settings, teacher=None), Display(quiet))


def _student(toy, teachers):
    return {
        "student.init": "pretrained",
        "student.layers": None,
        "student.model": str(toy / "gpt2"),
        "teacher.kind": "several",
        "teacher.settings": {"teachers": teachers},
    }


def test_a_mixture_of_a_teacher_with_itself_is_that_teacher(settings_of, toy, quiet):
    one = {"model": str(toy / "teacher"), "weight": 1.0}
    mixed = _student(toy, {"a": one, "b": one})
    found, _, _ = gradients(settings_of("rkl", {**mixed, "student.dropout": "off"}, teacher=None), quiet)
    alone = {name: value for name, value in mixed.items() if not name.startswith("teacher.")}
    live, _, _ = gradients(settings_of("rkl", {**alone, "student.dropout": "off"}), quiet)
    for name, gradient in live.items():
        torch.testing.assert_close(found[name], gradient, rtol=2e-3, atol=1e-6)


def test_a_run_logs_who_scored_what(settings_of, toy, other, quiet):
    teachers = {"reds": {"model": str(other), "when": "red"}, "rest": {"model": str(toy / "teacher")}}
    folder = run.train(settings_of("kd", _student(toy, teachers), teacher=None), console=quiet)
    (first, *_) = read_metrics(folder.metrics)
    assert first["teacher/reds/tokens"] + first["teacher/rest/tokens"] > 0
    assert "kl/forward" in first


@pytest.mark.parametrize(
    ("loss", "teachers", "words"),
    [
        ("kd", {"a": {"model": "x"}, "b": {"model": "y"}}, "exactly one teacher must be without `when`"),
        ("kd", {"a": {"model": "x", "weight": 1}, "b": {"model": "y"}}, "give one to each teacher, or to none"),
        ("kd", {"a": {"when": "("}, "b": {"model": "y"}}, "is no regular expression"),
        ("kd", {"a": {}}, "names no `model`, `store`, `server` or `base`"),
        ("kd", {"a": {"base": True, "model": "x"}}, "`base` is the student itself: leave out model"),
        ("seqkd", {"a": {"model": "x"}}, "one of several teachers writes none"),
        ("hidden-mse", {"a": {"model": "x"}}, "which one of several teachers does not have"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_loaded(settings_of, toy, loss, teachers, words):
    with pytest.raises(SettingsError, match=words):
        settings_of(loss, _student(toy, teachers), teacher=None)
