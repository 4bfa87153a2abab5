"""The student's own base as its teacher: the same run as with a second copy of it."""

from __future__ import annotations

import pytest
import torch
from test_invariants import gradients

from dpkd.api import Wants
from dpkd.data.batches import TokenSequence, collate
from dpkd.errors import DpkdError, SettingsError
from dpkd.run_metrics import read_metrics
from dpkd.teachers.base import BaseTeacher
from dpkd.train import run
from dpkd.train.plan import make_plan
from dpkd.train.progress import Display


@pytest.fixture
def adapted(settings_of, toy):
    """`adapted(loss, changes)`: the toy GPT-2 with adapters, its teacher to be named."""

    def make(loss, changes):
        student = {"student.init": "pretrained", "student.layers": None, "student.model": str(toy / "gpt2")}
        return settings_of(loss, {**student, "student.lora.r": 4, "student.dropout": "off", **changes}, teacher=None)

    return make


def test_a_base_says_what_a_copy_of_it_says(adapted, toy, quiet):
    """Also when the adapters are no longer zero, and it leaves them, their gradients and the mode as they were."""
    _, _, step = gradients(adapted("opd", {"teacher.base": True}), quiet)
    student = step.inner.student
    assert isinstance(step.teacher, BaseTeacher)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    trained = {name for name, parameter in student.named_parameters() if parameter.requires_grad}
    batch = collate([TokenSequence((5, 6), (7, 8, 9)), TokenSequence((1,), (2, 3))], pad_id=256)
    found = step.teacher.score(batch, Wants(4, logits=True)).logits(slice(None))

    from transformers import AutoModelForCausalLM

    copy = AutoModelForCausalLM.from_pretrained(toy / "gpt2").eval().double()  # as `gradients` makes the student
    with torch.no_grad():
        rows = [copy(torch.tensor([[*p, *r]])).logits[0, len(p) - 1 : -1] for p, r in batch.sequences]
    torch.testing.assert_close(found, torch.cat(rows)[:, : found.shape[1]], atol=1e-5, rtol=1e-4)
    assert trained == {name for name, parameter in student.named_parameters() if parameter.requires_grad}
    assert student.training


@pytest.mark.parametrize("loss", ["rkl", "dpkd"])
def test_a_run_with_the_base_is_the_run_with_its_copy(adapted, toy, quiet, tmp_path, loss):
    changes = {"train.steps": 3}
    if loss == "rkl":
        # The student begins as its teacher, where the gradient of a divergence is 0: the likelihood moves it.
        changes |= {"text.source": "dataset", "terms.lm.weight": 1}
    else:
        changes |= {"text.chosen": "dataset", "text.rejected": "student"}
    ends = []
    for name, teacher in (("base", {"teacher.base": True}), ("copy", {"teacher.model": str(toy / "gpt2")})):
        folder = run.train(adapted(loss, {**changes, **teacher, "output": str(tmp_path / name)}), console=quiet)
        ends.append([(line["loss/main"], line["kl/forward"]) for line in read_metrics(folder.metrics)])
    for one, other in zip(*ends, strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-6)
    assert len({end[0] for end in ends[0]}) > 1  # something was learned


def test_a_base_reads_a_context_that_the_student_does_not_see(adapted, quiet):
    teachers = {"informed": {"base": True, "context": "Answer: "}}
    changes = {"teacher.kind": "several", "teacher.settings": {"teachers": teachers}, "text.source": "dataset"}
    (first, *_) = read_metrics(run.train(adapted("kd", changes), console=quiet).metrics)
    assert first["kl/forward"] > 1e-3  # without the context the two are one model: 0


def test_what_a_base_needs_is_said(settings_of, adapted, toy, quiet):
    with pytest.raises(DpkdError, match=r"no adapters that could be switched off; --set student.lora.r=16"):
        make_plan(adapted("kd", {"teacher.base": True, "student.lora": None}), Display(quiet))
    with pytest.raises(SettingsError, match="the student's own base writes none"):
        adapted("seqkd", {"teacher.base": True})
    with pytest.raises(SettingsError, match="`base` is the student itself: leave out store"):
        adapted("kd", {"teacher.base": True, "teacher.store": "x"})
    rows = dict(make_plan(adapted("kd", {"teacher.base": True}), Display(quiet)).sections["models"])
    assert "no second copy" in rows["teacher"]
