"""Text by several writers for each prompt: every response is there, and the loss knows whose it is."""

from __future__ import annotations

import pytest
import torch
from test_invariants import gradients

from dpkd.api import Response, SourceContext, Text
from dpkd.data.batch_sampler import BatchSampler
from dpkd.data.encode import Prompt
from dpkd.errors import SettingsError
from dpkd.rollout.each import EachConfig, EachSource
from dpkd.train import run
from dpkd.train.build import assemble
from dpkd.train.plan import make_plan
from dpkd.train.progress import Display

SHORT = {"text.refresh": "every_step", "text.sampling.temperature": 1.0, "text.teacher_sampling.temperature": 1.0}
EACH = {"source": "each", "each": ["teacher", "student"]}


def _tokens(resolved, quiet):
    """Response tokens of the first step by writer."""
    run_parts = assemble(resolved, run._accelerator(resolved), Display(quiet))
    run_parts.prepare_sources()
    responses = [r for _, many in run_parts.builder.groups[0].source.next(0).responses for r in many]
    return {w: sum(len(r.ids) for r in responses if r.writer is w) for w in (Text.TEACHER, Text.STUDENT)}


def test_distillm2_is_skl_on_teacher_text_and_srkl_on_student_text(settings_of, quiet):
    """The mean over the tokens of both texts is the weighted sum of the means over each."""
    both = settings_of("distillm2", SHORT)
    found, metrics, _ = gradients(both, quiet)
    tokens = _tokens(both, quiet)
    share = {writer: count / sum(tokens.values()) for writer, count in tokens.items()}
    apart = {
        "terms.main": share[Text.TEACHER],
        "text.source": "teacher",
        "terms.extra.own": {
            "loss": "srkl",
            "weight": share[Text.STUDENT],
            "text": {"source": "student", "sampling": {"max_new_tokens": 8}},
        },
    }
    wanted, parts, _ = gradients(settings_of("skl", apart), quiet)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-7)
    assert metrics["part/skl"] == pytest.approx(parts["loss/main"], rel=1e-6)
    assert metrics["part/srkl"] == pytest.approx(parts["loss/own"], rel=1e-6)


def test_accumulation_changes_nothing(settings_of, quiet):
    whole = gradients(settings_of("distillm2", SHORT), quiet)[0]
    for name, gradient in gradients(settings_of("distillm2", SHORT | {"train.micro_batch_size": 2}), quiet)[0].items():
        torch.testing.assert_close(gradient, whole[name], rtol=1e-6, atol=1e-9)


def _source(by_student, by_teacher):
    """One prompt and one step, by writers who are told what to write; 9 is EOS."""
    prompt = Prompt(id="a", prompt_ids=(1,), response_ids=(2, 9), references=(), text="")
    context = SourceContext(
        [prompt],
        BatchSampler([3], batch_size=1, steps=1, seed=0),
        0,
        frozenset({9}),
        student=lambda indices, _period: [(Response(by_student, Text.STUDENT),) for _ in indices],
        teacher=lambda indices: [Response(by_teacher, Text.TEACHER) for _ in indices],
    )
    source = EachSource(EachConfig(each=("teacher", "student", "dataset")), context)
    source.prepare()
    return source


def test_all_write_and_equal_responses_stay():
    ((index, responses),), counts = _source((2, 9), (2, 9)).next(0)
    assert index == 0
    assert [r.writer for r in responses] == [Text.TEACHER, Text.STUDENT, Text.DATASET]
    assert (counts["responses"], counts["equal_pairs"], counts["empty_responses"]) == (3, 0, 0)


def test_an_empty_response_of_the_teacher_alone_is_left_out():
    ((_, responses),), counts = _source((9,), (9,)).next(0)
    assert [r.writer for r in responses] == [Text.STUDENT, Text.DATASET]
    assert counts["empty_responses"] == 2


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"text": {"source": "each"}}, "source `each` needs `each`: two or three different writers, got []"),
        ({"text": {"source": "each", "each": ["student"]}}, "got ['student']"),
        ({"text": {"source": "each", "each": ["student", "student"]}}, "got ['student', 'student']"),
        (
            {"text": {"source": "student", "each": ["student", "teacher"]}},
            "text.each: the source student has no such setting (each has it)",
        ),
    ],
)
def test_mistakes_have_their_sentences(changes, problem, settings_of):
    with pytest.raises(SettingsError) as caught:
        settings_of("kd", changes)
    assert problem in str(caught.value)


def test_a_loss_says_which_writer_it_does_not_take(settings_of):
    with pytest.raises(SettingsError, match=r"text\.each\.student: the loss seqkd takes text by dataset, teacher"):
        settings_of("seqkd", {"text": EACH})


def test_another_source_leaves_the_suggested_writers(settings_of, quiet):
    resolved = settings_of("distillm2", {"text.source": "student"})
    assert "each" not in resolved.as_dict()["text"]
    plan = make_plan(settings_of("distillm2", {"text.refresh": "every_step"}), Display(quiet))
    assert ("responses by", "each of teacher, student, to every prompt") in plan.sections["text"]
