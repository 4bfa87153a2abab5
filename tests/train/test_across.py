"""Gradients across tokenizers: equal to the dense computation, whatever the micro-batches and chunks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from rich.console import Console
from test_invariants import _NoStep
from two_tokenizers import dense

from dpkd.teachers.aligned import AlignedTeacher
from dpkd.train import run
from dpkd.train.build import assemble
from dpkd.train.microbatch import MicroBatcher
from dpkd.train.progress import Display


def gradients(resolved: Any, quiet: Console, chunk: int = 7) -> tuple[dict[str, torch.Tensor], dict[str, float], Any]:
    """Gradients and metrics of the first step in float64, and the parts of the run."""
    run_parts = assemble(resolved, run._accelerator(resolved), Display(quiet))
    train_step = run_parts.train_step
    train_step.loss_module.double()
    train_step.loss_module.chunk = chunk
    assert isinstance(train_step.teacher, AlignedTeacher)
    local = train_step.teacher.local
    local.model.double()
    local._head = local._head.cast(torch.float64)
    train_step.optimizer, train_step.clip = _NoStep(train_step.loss_module), None
    run_parts.prepare_sources()
    texts = []
    for group in run_parts.builder.groups:
        texts.append(group.source.next(0))
    metrics = train_step(run_parts.builder.step_batches(0, texts), lr=0.0, measure=False)
    found = {n: p.grad.clone() for n, p in train_step.loss_module.named_parameters() if p.grad is not None}
    return found, metrics.averages(), (run_parts, texts)


@pytest.mark.parametrize("loss", ["uld", "gold"])
@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("source", ["dataset", "teacher", "student"])
def test_the_gradient_is_that_of_the_dense_computation(loss, source, swap, across, quiet):
    resolved = across(loss, {"text.source": source, "train.micro_batch_size": 3}, swap=swap)
    found, metrics, (run_parts, texts) = gradients(resolved, quiet)
    loss_module = run_parts.train_step.inner
    loss_module.zero_grad()
    want = dense(run_parts, texts, loss_module.losses["main"], resolved.main.reads)
    want.backward()
    assert metrics["loss/main"] == pytest.approx(want.item(), rel=1e-9)
    assert source != "dataset" or 0 < metrics["spans/single"] < 1
    for name, parameter in loss_module.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize(
    ("loss", "changes"),
    [("gold", {"terms.lm.weight": 0.3}), ("uld", {"student.lora": {"r": 4}, "text.source": "student"})],
)
def test_the_gradient_depends_neither_on_accumulation_nor_on_chunks(loss, changes, swap, across, quiet):
    results = []
    for i, (micro, chunk) in enumerate([(8, 1000), (3, 1000), (1, 1000), (8, 1), (8, 5)]):
        split = {"train.batch_size": 8, "train.micro_batch_size": micro}
        given = {"text.source": "dataset", **changes, **split}
        results.append(gradients(across(loss, given, f"run{i}", swap=swap), quiet, chunk)[:2])
    whole, metrics = results[0]
    assert any(g.abs().max() > 0 for g in whole.values())
    for found, other in results[1:]:
        assert found.keys() == whole.keys()
        for name, gradient in whole.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-6, atol=1e-9)
        for key in ("loss/main", "spans/covered", *(["loss/lm"] if "terms.lm.weight" in changes else [])):
            assert other[key] == pytest.approx(metrics[key], rel=1e-9)


def test_the_lm_term_counts_tokens_and_the_loss_counts_spans(across, quiet):
    _, metrics, (run_parts, texts) = gradients(across("uld", {"terms.lm.weight": 1.0}), quiet)
    step_batches = run_parts.builder.step_batches(0, texts)
    (step_batch,) = step_batches
    spans = sum(len(group.aligned.spans) for group in step_batch.groups)
    tokens = sum(len(r.ids) for _, (r,) in texts[0].responses)
    assert {t.name: t.denominator for t in step_batch.terms} == {"main": spans, "lm": tokens}
    assert spans < tokens
    assert metrics["part/nll"] * spans == pytest.approx(metrics["loss/lm"] * tokens, rel=1e-9)


def test_an_idle_process_gives_zero(across, quiet):
    _, _, (run_parts, texts) = gradients(across("uld"), quiet)
    (step_batch,) = run_parts.builder.step_batches(0, texts)
    (idle,) = MicroBatcher(8, 256, rank=1, processes=2)(
        replace(step_batch, groups=step_batch.groups[:1]), measure=False
    )
    train_step = run_parts.train_step
    total, metrics = train_step.loss_module(train_step.with_teacher(idle))
    total.backward()
    assert total.item() == 0.0
    assert metrics.averages() == {}


@pytest.mark.parametrize(
    "changes",
    [
        {"text.source": "student", "text.num_generations": 2},
        {"text.source": "each", "text.each": ["dataset", "student"]},
    ],
)
def test_several_responses_to_a_prompt_have_a_twin_each(changes, across, quiet):
    found, _, (run_parts, texts) = gradients(across("uld", changes), quiet)
    (step_batch,) = run_parts.builder.step_batches(0, texts)
    assert len(step_batch.groups) == 2 * len(texts[0].responses)
    assert all(len(group.sequences) == 1 and group.aligned is not None for group in step_batch.groups)
    # One micro-batch or many: the same gradient.
    again, _, _ = gradients(across("uld", {**changes, "train.micro_batch_size": 1}), quiet)
    for name, gradient in found.items():
        torch.testing.assert_close(again[name], gradient, rtol=1e-5, atol=1e-8)
