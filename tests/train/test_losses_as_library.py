"""A step of `dpkd train` and the same step by dpkd.losses on models of transformers: one value, one gradient."""

from __future__ import annotations

import pytest
import torch
from test_invariants import assert_same, gradients

from dpkd import losses
from dpkd.api import Signal
from dpkd.train import microbatch


@pytest.fixture
def steps(monkeypatch):
    """The step batches of the engine, as they are made."""
    seen = []
    original = microbatch.MicroBatcher.__call__

    def keep(self, step_batch, measure):
        seen.append(step_batch)
        return original(self, step_batch, measure)

    monkeypatch.setattr(microbatch.MicroBatcher, "__call__", keep)
    return seen


def padded(sequences):
    """Ids, attention mask and labels, padded on the right, from the ids of prompts and responses."""
    longest = max(len(s.prompt_ids) + len(s.response_ids) for s in sequences)
    ids, mask, labels = (torch.full((len(sequences), longest), fill) for fill in (256, 0, -100))
    for b, (prompt, response) in enumerate(sequences):
        stop = len(prompt) + len(response)
        ids[b, :stop] = torch.tensor([*prompt, *response])
        mask[b, :stop] = 1
        labels[b, len(prompt) : stop] = torch.tensor(response)
    return {"input_ids": ids, "attention_mask": mask}, labels


def drawn(groups, labels):
    """What the engine knew about each sampled token, at its place `[B, T]`."""
    columns = {}
    for name in ("rollout_logps", "behaviour_logps", "teacher_logps", "advantages"):
        values = [getattr(r, name) for group in groups for r in group.responses]
        if all(v is not None for v in values):
            columns[name] = torch.zeros(labels.shape, dtype=torch.float64)
            for b, row in enumerate(values):
                columns[name][b, labels[b] != -100] = row.double()
    return columns


@pytest.mark.parametrize("hidden", [False, True], ids=["logits", "hidden"])
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("jsd", {}),
        ("distillm2", {}),
        ("dpkd", {"terms.lm.weight": 0.0}),
        ("dpo", {}),
        ("minillm", {"text.every": 1}),
        ("opd", {}),
    ],
)
def test_one_step(name, changes, hidden, settings_of, quiet, steps):
    changes = {"train.batch_size": 6, "train.micro_batch_size": 4, "batch.shared_prompts": False, **changes}
    wanted, metrics, train_step = gradients(settings_of(name, changes), quiet)
    (step_batch,), student, teacher = steps, train_step.inner.student, train_step.teacher.model
    reference = train_step.reference
    student.zero_grad()
    loss = losses.get(name)
    total, groups = 0.0, step_batch.groups
    items = len(groups) if step_batch.pairs else sum(len(s.response_ids) for g in groups for s in g.sequences)
    for part in (groups[:2], groups[2:]):
        sequences = [s for g in part for s in g.sequences]
        if step_batch.pairs:
            sequences = [g.sequences[0] for g in part] + [g.sequences[1] for g in part]
        inputs, labels = padded(sequences)
        others = {} if step_batch.pairs else drawn(part, labels)
        if Signal.BY_STUDENT in loss.reads:
            others["by_student"] = torch.tensor([r.writer == "student" for g in part for r in g.responses])
        with torch.no_grad():
            theirs = teacher(**inputs, output_hidden_states=hidden)
        ours = student(**inputs, output_hidden_states=hidden)
        if hidden:
            if reference is not None:
                theirs = reference.model.double()(**inputs, output_hidden_states=True)
                others |= {"reference_hidden": theirs.hidden_states[-1].detach(), "reference_head": reference.model}
            states = (ours.hidden_states[-1], student, theirs.hidden_states[-1], teacher)
            value = loss.from_hidden(*states, labels, **others, num_items_in_batch=items)
        else:
            if reference is not None:
                others["reference_logits"] = reference.model.double()(**inputs).logits
            call = loss.from_logits if step_batch.pairs else loss
            value = call(
                student_logits=ours.logits,
                teacher_logits=theirs.logits,
                labels=labels,
                **others,
                num_items_in_batch=torch.tensor(items),
            )
        value.backward()
        total += value.item()
    # Llama's norms compute in float32 whatever the weights: their last digit may turn with the row's width.
    assert total == pytest.approx(metrics["loss/main"], rel=1e-6)
    found = {f"student.{n}": p.grad for n, p in student.named_parameters() if p.grad is not None}
    assert_same(found, wanted)
