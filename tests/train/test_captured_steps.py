"""Whole training steps over recorded passes: the weights that plain steps give, and no value read in between."""

from __future__ import annotations

import pytest
import torch

from dpkd.models.captured import capture, captured
from dpkd.models.head import causal_lm
from tests.train.test_no_host_waits import NoWaits, ready

CASES = [
    ("kd", {"train.micro_batch_size": 2}),
    ("jsd", {}),
    ("minillm", {"text.every": 1}),
    ("dpkd", {}),
    ("dpo", {"batch.shared_prompts": False}),
    ("kd", {"student.lora": {"r": 2}, "student.init": "pretrained", "student.layers": None}),
]


def recorded(train_step):
    """Its models, recorded from now on."""
    said = []
    models = [one.model for one in (train_step.teacher, train_step.reference) if one is not None]
    for model in (train_step.inner.student, *models):
        capture(causal_lm(model), said.append)
    return [captured(causal_lm(model).base_model) for model in (train_step.inner.student, *models)], said


def settled(changes, toy):
    if "student.lora" in changes:
        changes = changes | {"student.model": str(toy / "teacher")}
    return changes


@pytest.mark.parametrize(("loss", "changes"), CASES)
def test_steps_over_recorded_passes_give_the_weights_of_plain_steps(loss, changes, settings_of, toy, quiet, far_device):
    found = []
    for with_graphs in (False, True):
        train_step, step_batches = ready(settings_of(loss, settled(changes, toy)), quiet)
        graphs, said = recorded(train_step) if with_graphs else ([], [])
        metrics = [train_step(step_batches, lr=1e-4, measure=i == 3).averages() for i in range(5)]
        assert all(one._passes for one in graphs)
        assert not said
        found.append((metrics, [p.detach().clone() for p in train_step.loss_module.parameters()]))
    (metrics, weights), (others, after) = found
    for one, other in zip(metrics, others, strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-6)
    for one, other in zip(weights, after, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-5)  # a fifth of one update of AdamW


@pytest.mark.parametrize(("loss", "changes"), CASES[:4])
def test_a_step_over_recorded_passes_reads_no_value(loss, changes, settings_of, quiet, far_device, no_reading):
    train_step, step_batches = ready(settings_of(loss, changes), quiet)
    graphs, _ = recorded(train_step)
    for _ in range(3):
        train_step(step_batches, lr=1e-3, measure=False)
    assert all(one._passes for one in graphs), [one._seen for one in graphs]
    no_reading()
    with NoWaits():
        train_step(step_batches, lr=1e-3, measure=False)
