"""Several responses by the student to each prompt: which, how they are counted, and what stays as it was."""

from __future__ import annotations

import json
import re
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch
from test_invariants import _NoStep, assert_same, gradients

from dpkd.api import StepResponses, Text
from dpkd.errors import SettingsError
from dpkd.rollout.backends.hf import HfSampler
from dpkd.rollout.generator import response_seed, sample_seeds
from dpkd.rollout.policy_logps import PolicyScorer
from dpkd.run_metrics import read_metrics
from dpkd.train import run
from dpkd.train.build import assemble
from dpkd.train.probe import longest_responses
from dpkd.train.progress import Display
from dpkd.train.resume import resume_folder

STUDENT = {"text.source": "student", "train.batch_size": 4}
ROLLOUT = {**STUDENT, "text.refresh": "every_n_steps", "text.every": 2, "text.num_iterations": 2}


def test_seeds_are_distinct_and_the_first_is_that_of_one_response():
    rows = [sample_seeds(10, period, name, 5) for period in range(3) for name in ("a", "sample", "1", "0/a")]
    assert len({seed for row in rows for seed in row}) == 60
    assert sample_seeds(10, 2, "a", 1) == [response_seed(10, 2, "a")] == sample_seeds(10, 2, "a", 4)[:1]
    assert all(0 <= seed < 2**63 for row in rows for seed in row)


@pytest.fixture
def written(settings_of, quiet, tmp_path):
    """The text of the first step of a run, and the parts of the run."""

    def write(loss: str, changes: dict[str, object]):
        resolved = settings_of(loss, {**changes, "output": str(tmp_path / f"run-{len(list(tmp_path.iterdir()))}")})
        run_parts = assemble(resolved, run._accelerator(resolved), Display(quiet))
        return run_parts.builder.groups[0].source.next(0), run_parts

    return write


@pytest.mark.parametrize("loss", ["rkl", "minillm"])
def test_the_first_response_is_the_one_that_would_be_alone(loss, written):
    alone, _ = written(loss, STUDENT)
    several, _ = written(loss, {**STUDENT, "text.num_generations": 3})
    assert len(several.responses) == len(alone.responses) == 4
    assert [index for index, _ in several.responses] == [index for index, _ in alone.responses]
    for (_, (one,)), (_, (first, _, _)) in zip(alone.responses, several.responses, strict=True):
        assert one.ids == first.ids
        if loss == "minillm":
            assert torch.equal(one.rollout_logps, first.rollout_logps)
            torch.testing.assert_close(one.teacher_logps, first.teacher_logps, rtol=1e-6, atol=1e-6)
    assert len({r.ids for _, many in several.responses for r in many}) > 8
    if loss == "minillm":
        assert all(len(r.advantages) == len(r.ids) for _, many in several.responses for r in many)


def test_a_prompt_is_read_once_for_all_its_responses(written, monkeypatch):
    tasks, draw = [], HfSampler.draw
    monkeypatch.setattr(HfSampler, "draw", lambda self, task, *more: tasks.append(task) or draw(self, task, *more))
    written("rkl", {**STUDENT, "text.num_generations": 3})
    assert [(len(t.prompts), len(t.seeds), t.num_generations) for t in tasks] == [(4, 12, 3)]


def test_the_denominator_counts_the_tokens_of_all_responses(written):
    """The gradient is the mean over all tokens: that of each part of the responses, weighted by its tokens."""
    text, run_parts = written("rkl", {**STUDENT, "text.num_generations": 2})
    # Of unequal lengths, so that a mean of two means is another number.
    apart = [(i, r) for i, many in text.responses for r in many]
    mixed = [(i, (replace(r, ids=r.ids[: 2 + place]),)) for place, (i, r) in enumerate(apart)]
    train_step = run_parts.train_step
    train_step.loss_module.double()
    train_step.teacher.model.double()
    train_step.teacher._head = train_step.teacher._head.cast(torch.float64)
    train_step.optimizer, train_step.clip = _NoStep(train_step.loss_module), None

    def gradient(responses):
        train_step(run_parts.builder.step_batches(0, [StepResponses(responses, {})]), lr=0.0, measure=False)
        return {n: p.grad.clone() for n, p in train_step.loss_module.named_parameters()}, sum(
            len(r.ids) for _, (r,) in responses
        )

    (first, n), (second, m), (both, total) = (gradient(responses) for responses in (mixed[::2], mixed[1::2], mixed))
    assert n != m
    assert total == n + m
    assert_same(both, {name: (first[name] * n + second[name] * m) / total for name in both})


@pytest.mark.parametrize("loss", ["rkl", "minillm"])
def test_the_gradient_does_not_depend_on_accumulation(loss, settings_of, quiet, tmp_path):
    found = []
    for micro in (12, 5, 1):
        changes = {"train.micro_batch_size": micro, "output": str(tmp_path / f"m{micro}")}
        resolved = settings_of(loss, {**STUDENT, "text.num_generations": 3, **changes})
        found.append(gradients(resolved, quiet)[0])
    for one, other in pairwise(found):
        assert_same(other, one)


def test_a_mixed_text_has_several_responses_where_the_student_writes(settings_of, quiet):
    mix = {"text.source": "mixed", "text.mix": {"dataset": 0.5, "student": 0.5}, "text.num_generations": 3}
    resolved = settings_of("jsd", {**mix, "train.steps": 6, "train.batch_size": 4})
    folder = run.train(resolved, console=quiet)
    lines = read_metrics(folder.metrics)
    for line in lines:
        assert line["text/responses"] == (12 if "length/student" in line else 4)
        assert 0 <= line["text/truncated_share"] <= 1
    assert {line["text/responses"] for line in lines} == {4, 12}


@pytest.mark.parametrize("loss", ["rkl", "minillm"])
def test_an_interrupted_run_continues_bit_for_bit(loss, settings_of, quiet, stops, tmp_path):
    changes = {**ROLLOUT, "text.num_generations": 2, "train.steps": 4}
    straight = run.train(settings_of(loss, {**changes, "output": str(tmp_path / "straight")}), console=quiet)
    resolved = settings_of(loss, {**changes, "output": str(tmp_path / "stopped")})
    with stops():
        run.train(resolved, console=quiet)
    (kept,) = (tmp_path / "stopped/checkpoints").glob("step-*/sources.json")
    rows = json.loads(kept.read_text(encoding="utf-8"))["main"]["responses"]
    assert [len(responses) for _, responses in rows] == [2] * 8
    resumed = resume_folder(tmp_path / "stopped", console=quiet)
    timed = {"seconds", "tokens_per_second", "peak_memory_mib"}
    for one, other in zip(read_metrics(straight.metrics), read_metrics(resumed.metrics), strict=True):
        assert {k: v for k, v in one.items() if k not in timed} == {k: v for k, v in other.items() if k not in timed}


def test_the_probe_and_the_plan_count_them(written, settings_of, quiet):
    _, run_parts = written("rkl", {**STUDENT, "text.num_generations": 3})
    text = longest_responses(run_parts.builder.groups[0], 4)
    assert [r.writer for _, many in text.responses for r in many] == [Text.STUDENT] * 12
    plan = run_plan(settings_of("rkl", {**STUDENT, "text.num_generations": 3}), quiet)
    assert plan["student writes"].startswith("every_step: 24 responses in 2 collections")


def run_plan(resolved, console) -> dict[str, str]:
    from dpkd.train.plan import make_plan

    return dict(make_plan(resolved, Display(console)).sections["text"])


@pytest.mark.parametrize(
    ("loss", "changes", "message"),
    [
        ("dpkd", {}, "the source pairs has no such setting (mixed, student have it)"),
        ("kd", {}, "the source dataset has no such setting (mixed, student have it)"),
        ("rkl", {"text.source": "teacher"}, "the source teacher has no such setting (mixed, student have it)"),
        (
            "rkl",
            {"text.source": "mixed", "text.mix": {"dataset": 0.5, "teacher": 0.5}},
            "`num_generations` is used only where the student writes",
        ),
    ],
)
def test_it_is_refused_where_it_means_nothing(loss, changes, message, settings_of):
    with pytest.raises(SettingsError, match=re.escape(message)):
        settings_of(loss, {"text.num_generations": 2, **changes})


def test_an_extra_loss_with_its_own_text_is_checked_too(settings_of):
    text = {"source": "dataset", "num_generations": 2}
    with pytest.raises(SettingsError, match=re.escape("terms.extra.more.text.num_generations: the source dataset has")):
        settings_of("kd", {"terms.extra.more.loss": "sft", "terms.extra.more.text": text})


def test_a_policy_gradient_gets_the_log_probs_of_the_training_path(written):
    """As on a GPU, where what draws rounds otherwise than what trains: bfloat16 autocast stands for that here."""
    _, run_parts = written("minillm", STUDENT)
    generator = run_parts.builder.groups[0].source.context.student
    vocabulary, pad_id = run_parts.vocabulary, run_parts.run_data.tokenizer.pad_token_id
    device = torch.device("cpu")
    plain = generator([0, 1, 2], 0)
    autocast = partial(torch.autocast, "cpu", torch.bfloat16)
    generator.policy = PolicyScorer(vocabulary, pad_id, device, autocast)
    scored = generator([0, 1, 2], 0)
    for (one,), (other,) in zip(plain, scored, strict=True):
        assert one.ids == other.ids
        assert torch.equal(one.behaviour_logps, other.behaviour_logps)
        assert not torch.equal(one.rollout_logps, other.rollout_logps)
        torch.testing.assert_close(one.rollout_logps, other.rollout_logps, rtol=0, atol=0.1)
        assert not torch.equal(one.advantages, other.advantages)
    generator.policy = PolicyScorer(vocabulary, pad_id, device, nullcontext)
    for (one,), (other,) in zip(plain, generator([0, 1, 2], 0), strict=True):
        torch.testing.assert_close(one.rollout_logps, other.rollout_logps, rtol=0, atol=1e-5)
