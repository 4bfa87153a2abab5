"""What must not change a result: accumulation, padding, the number of processes. And who is run, and how often."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from toy_runs import torchrun

from dpkd.api import Response, Text
from dpkd.data.batches import Layout, TokenSequence, collate
from dpkd.models import layouts
from dpkd.models.head import hidden_rows
from dpkd.run_metrics import read_metrics
from dpkd.teachers.local import LocalTeacher
from dpkd.train import run
from dpkd.train.build import assemble
from dpkd.train.microbatch import MicroBatcher, PromptGroup, StepBatch, Term
from dpkd.train.progress import Display


class _NoStep:
    """Stands in for the optimizer: gradients are kept and weights stay."""

    def __init__(self, module):
        self._module, self.param_groups = module, []

    def zero_grad(self, set_to_none=True):
        self._module.zero_grad(set_to_none=True)

    def step(self):
        pass


def gradients(resolved, quiet):
    """Gradients of the first optimizer step in float64, and the parts of the run."""
    accelerator = run._accelerator(resolved)
    run_parts = assemble(resolved, accelerator, Display(quiet))
    train_step = run_parts.train_step
    train_step.loss_module.double()
    if isinstance(train_step.teacher, LocalTeacher):
        train_step.teacher.model.double()
        train_step.teacher._head = train_step.teacher._head.cast(torch.float64)
    train_step.optimizer, train_step.clip = _NoStep(train_step.loss_module), None
    run_parts.prepare_sources()
    texts = []
    for group in run_parts.builder.groups:
        texts.append(group.source.next(0))
    step_batches = run_parts.builder.step_batches(0, texts)
    metrics = train_step(step_batches, lr=0.0, measure=False)
    found = {n: p.grad.clone() for n, p in train_step.loss_module.named_parameters() if p.grad is not None}
    return found, metrics.averages(), train_step


def assert_same(found, wanted):
    """Equal gradients, but for the last digits: Llama's norms compute in float32 whatever the weights."""
    assert found.keys() == wanted.keys()
    largest = max(float(gradient.abs().max()) for gradient in wanted.values())
    assert largest > 0
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6 * largest, msg=name)


@pytest.mark.parametrize(
    ("loss", "changes"),
    [
        ("kd", {}),
        ("akl", {"terms.lm.weight": 0.3}),
        ("dpkd", {}),
        ("dpkd-cpo", {}),
        ("minillm", {"text.every": 1}),
        ("rkl", {"text.source": "student", "student.lora": {"r": 4}}),
    ],
)
def test_the_gradient_does_not_depend_on_accumulation(loss, changes, settings_of, quiet, tmp_path):
    results = {}
    for micro in (8, 4, 2, 1):
        changed = changes | {
            "train.batch_size": 8,
            "train.micro_batch_size": micro,
            "output": str(tmp_path / f"m{micro}"),
        }
        results[micro] = gradients(settings_of(loss, changed), quiet)[:2]
    whole, metrics = results[8]
    for micro in (4, 2, 1):
        found, other = results[micro]
        assert_same(found, whole)
        assert other["loss/main"] == pytest.approx(metrics["loss/main"], rel=1e-6)


def test_the_denominator_is_the_tokens_of_the_window(settings_of, quiet):
    """Two micro-batches of unequal lengths: not the mean of their means."""
    resolved = settings_of("sft", {"train.micro_batch_size": 1, "train.batch_size": 2})
    found, metrics, train_step = gradients(resolved, quiet)
    loss_module = train_step.inner
    loss_module.zero_grad()
    assembly_rows = []
    for i in stepper_window(resolved, quiet):
        batch = collate([i], pad_id=256)
        hidden = hidden_rows(loss_module.student, batch)
        logits = loss_module.student.lm_head(hidden)
        assembly_rows.append(torch.nn.functional.cross_entropy(logits, batch.targets, reduction="none"))
    assert len({len(rows) for rows in assembly_rows}) == 2
    mean = torch.cat(assembly_rows).mean()
    assert metrics["loss/main"] == pytest.approx(mean.item(), rel=1e-9)
    mean.backward()
    for name, parameter in loss_module.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize(
    "changes",
    [
        {"batch.shared_prompts": True},
        {"batch.packing": "on"},
        {"batch.packing": "on", "batch.shared_prompts": True},
        {"batch.tokens": 40},
        {"batch.tokens": 64, "batch.packing": "on"},
        {"batch.tokens": 1},
    ],
)
@pytest.mark.parametrize("loss", ["dpkd", "kd", "minillm"])
def test_the_layout_of_batches_changes_no_gradient(loss, changes, settings_of, quiet, tmp_path):
    plain = {"train.batch_size": 8, "batch.shared_prompts": False, "output": str(tmp_path / "plain")}
    whole, metrics, train_step = gradients(settings_of(loss, plain), quiet)
    assert train_step.micro_batcher.layouts == (Layout(),)
    found, other, train_step = gradients(settings_of(loss, plain | changes | {"output": str(tmp_path / "new")}), quiet)
    usual = Layout(packed="batch.packing" in changes)
    sharing = (Layout(shared=True),) if "batch.shared_prompts" in changes else ()
    assert train_step.micro_batcher.layouts == (usual, *sharing)
    assert_same(found, whole)
    assert other["loss/main"] == pytest.approx(metrics["loss/main"], rel=1e-6)


@pytest.mark.parametrize("loss", ["dpkd", "kd"])
def test_on_a_cpu_rows_of_large_models_are_packed_where_that_saves_a_tenth(
    loss, settings_of, quiet, tmp_path, monkeypatch
):
    plain = {"train.batch_size": 8, "batch.packing": "off", "output": str(tmp_path / "plain")}
    whole, metrics, _ = gradients(settings_of(loss, plain), quiet)
    monkeypatch.setattr(layouts, "PACKS_FROM", 1)
    resolved = settings_of(loss, plain | {"batch.packing": "auto", "output": str(tmp_path / "new")})
    found, other, train_step = gradients(resolved, quiet)
    assert train_step.micro_batcher.layouts == (Layout(), Layout(packed=True), Layout(shared=True))
    assert_same(found, whole)
    assert other["loss/main"] == pytest.approx(metrics["loss/main"], rel=1e-6)
    monkeypatch.setattr(layouts, "PACKS_FROM", 10**9)
    _, _, train_step = gradients(resolved, quiet)
    assert train_step.micro_batcher.layouts == (Layout(), Layout(shared=True))


def test_a_step_batch_takes_the_layout_with_the_fewest_tokens():
    def shape(*lengths):
        groups = [PromptGroup((TokenSequence((5,) * 4, (1,) * n),)) for n in lengths]
        (micro_batch,) = MicroBatcher(8, 256, layouts=(Layout(), Layout(packed=True)))(
            StepBatch("main", groups, []), measure=False
        )
        return tuple(micro_batch.batch.input_ids.shape)

    assert shape(6, 6, 5) == (3, 10)  # 29 tokens of 30: not worth it
    assert shape(16, 6, 6) == (1, 40)  # of 60


def test_pairs_share_their_prompt_unless_it_is_too_short_to_matter(settings_of, quiet):
    def rows(prompt_tokens):
        group = PromptGroup(
            (TokenSequence((5,) * prompt_tokens, (1, 2, 256)), TokenSequence((5,) * prompt_tokens, (3, 256))),
            (Response((1, 2, 256), Text.TEACHER), Response((3, 256), Text.STUDENT)),
        )
        (micro_batch,) = MicroBatcher(8, 256, layouts=(Layout(), Layout(shared=True)))(
            StepBatch("main", [group], [], True), measure=False
        )
        return micro_batch.batch.input_ids.shape

    assert rows(20) == (1, 25)
    assert rows(0) == (2, 3)


def test_no_micro_batch_has_more_tokens_than_asked_for():
    groups = [PromptGroup((TokenSequence((1,) * n, (2,) * n),)) for n in range(1, 12)]
    for packed in (False, True):
        micro_batches = MicroBatcher(64, 0, tokens=48, layouts=(Layout(packed=packed),))(
            StepBatch("main", groups, []), measure=False
        )
        assert len(micro_batches) > 2
        assert all(micro_batch.batch.input_ids.numel() <= 48 for micro_batch in micro_batches)
        assert sum(len(micro_batch.batch.sequences) for micro_batch in micro_batches) == 11


def stepper_window(resolved, quiet):
    """The sequences of the first window."""
    run_parts = assemble(resolved, run._accelerator(resolved), Display(quiet))
    prompts = run_parts.run_data.data.prompts
    return [
        TokenSequence(prompts[i].prompt_ids, prompts[i].response_ids)
        for i in run_parts.builder.groups[0].source.context.batches.window(0)
    ]


def test_the_teacher_runs_once_per_micro_batch_and_only_when_read(settings_of, quiet):
    _, _, train_step = gradients(settings_of("kd", {"train.batch_size": 8, "train.micro_batch_size": 4}), quiet)
    assert train_step.teacher.forwards == 2
    assert not train_step.teacher.model.training
    assert all(not p.requires_grad for p in train_step.teacher.model.parameters())
    _, _, train_step = gradients(settings_of("sft", {"train.batch_size": 8, "train.micro_batch_size": 4}), quiet)
    assert train_step.teacher.forwards == 0  # not measured, not read


def test_a_process_with_nothing_to_do_gives_zero_and_finite_gradients(settings_of, quiet):
    _, _, train_step = gradients(settings_of("kd"), quiet)
    group = PromptGroup((TokenSequence((1, 2), (3, 256)),))
    for pairs, name in ((False, "kd"), (True, "dpkd")):
        groups = [group] if not pairs else [PromptGroup((group.sequences[0], group.sequences[0]))]
        resolved = settings_of(name)
        _, _, train_step = gradients(resolved, quiet)
        term = Term("main", resolved.loss.signals(resolved.main.config), 1.0, 5.0)
        step_batch = StepBatch("main", groups, [term], pairs)
        (idle,) = MicroBatcher(8, 256, rank=1, processes=2)(step_batch, measure=False)
        total, metrics = train_step.loss_module(train_step.with_teacher(idle))
        total.backward()
        assert total.item() == 0.0
        assert metrics.averages() == {}
        grads = [p.grad for p in train_step.loss_module.parameters() if p.grad is not None]
        assert all(torch.isfinite(g).all() for g in grads)


@pytest.mark.parametrize("loss", ["kd", "dpkd"])
def test_two_processes_give_what_one_gives(loss, settings_of, toy, quiet, tmp_path):
    one = run.train(settings_of(loss, {"train.batch_size": 7, "train.micro_batch_size": 4}), console=quiet)
    args = ["train", "--loss", loss, "--teacher", str(toy / "teacher"), "--data", str(toy / "data.jsonl")]
    args += ["--output", str(tmp_path / "two")]
    for path, value in {
        "student.init": "layers",
        "student.layers": 2,
        "train.steps": 2,
        "train.batch_size": 7,
        "train.log_every": 1,
        "train.micro_batch_size": 4,
        "train.device": "cpu",
        "train.lr": 1e-3,
        "text.sampling.max_new_tokens": 8,
        "text.teacher_sampling.max_new_tokens": 8,
    }.items():
        args += ["--set", f"{path}={value}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONWARNINGS": "ignore"}
    port = 29500 + os.getpid() % 400
    done = torchrun("-m", "dpkd.cli.main", *args, port=port, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    for mine, theirs in zip(read_metrics(one.metrics), read_metrics(Path(tmp_path / "two/metrics.jsonl")), strict=True):
        for name in ("loss/main", "gradient_norm", "kl/forward", "kl/reverse", "nll/student"):
            assert theirs[name] == pytest.approx(mine[name], rel=1e-4), name
