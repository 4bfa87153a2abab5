"""What a step does where reading a value of the device makes the host wait, as on a GPU: it reads none.

A CPU cannot wait, so `free_to_read` is made to say no: then all code takes the way that it takes on a GPU.
"""

from __future__ import annotations

import pytest
import torch
from no_waits import NoWaits

from dpkd import functional
from dpkd.data.batches import TokenSequence, collate
from dpkd.models.attention import CAUSAL, implementation
from dpkd.models.head import hidden_rows
from dpkd.train import run
from dpkd.train.build import assemble
from dpkd.train.nonfinite import NotFinite
from dpkd.train.progress import Display
from dpkd.train.timings import Timings


def ready(resolved, quiet, step=0):
    """The run's parts, and the step batches of a step."""
    parts = assemble(resolved, run._accelerator(resolved), Display(quiet))
    parts.prepare_sources()
    texts = [group.source.next(step) for group in parts.builder.groups]
    return parts.train_step, parts.builder.step_batches(step, texts)


# Of each kind of loss one: tests of the zoo look at each by itself.
CASES = [
    ("kd", {}),
    ("jsd", {}),
    ("fkl", {"train.precision": "bf16"}),
    ("akl", {}),
    ("dpkd-token", {"terms.lm.weight": 0.5, "train.micro_batch_size": 2}),
    ("minillm", {"text.every": 1}),
    ("rkl", {"text.source": "student"}),
    ("distillm2", {}),
    ("dpkd", {}),
    ("dpkd-simpo", {"batch.shared_prompts": False}),
    ("kd", {"student.init": "pretrained", "student.layers": None, "student.model": "gpt2"}),
]


@pytest.mark.parametrize(("loss", "changes"), CASES)
def test_a_whole_step_reads_no_value(loss, changes, settings_of, toy, quiet, far_device, far_clock, no_reading):
    if "student.model" in changes:
        changes = changes | {"student.model": str(toy / "gpt2")}
    train_step, step_batches = ready(settings_of(loss, changes), quiet)
    train_step.timings = Timings(on=True)  # which asks for no event that has not passed
    train_step.timings.begin_steps(far_clock)
    no_reading()
    with NoWaits():
        for _ in range(2):  # the first makes the optimizer's state
            train_step(step_batches, lr=1e-3, measure=False)


@pytest.mark.parametrize("loss", ["kd", "jsd", "akl", "minillm", "dpkd"])
def test_the_step_is_the_same(loss, settings_of, quiet, monkeypatch):
    found = []
    for free in (True, False):
        monkeypatch.setattr(functional, "free_to_read", lambda device, free=free: free)
        train_step, step_batches = ready(settings_of(loss, {"text.every": 1} if loss == "minillm" else {}), quiet)
        metrics = train_step(step_batches, lr=1e-3, measure=False).averages()
        found.append((metrics, [p.detach().clone() for p in train_step.loss_module.parameters()]))
    (metrics, weights), (others, after) = found
    assert metrics == pytest.approx(others, rel=1e-5)
    for one, other in zip(weights, after, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-4)  # AdamW's first step is the sign of the gradient


def test_a_step_that_is_not_finite_changes_no_weight_and_neither_do_those_after_it(
    settings_of, quiet, far_device, monkeypatch
):
    """The culprit is named at the next logged step, from the step that failed."""
    train_step, step_batches = ready(settings_of("kd"), quiet)
    train_step(step_batches, lr=1e-3, measure=True)
    loss, before = train_step.inner.losses["main"], [p.detach().clone() for p in train_step.inner.parameters()]
    forward = type(loss).forward
    monkeypatch.setattr(type(loss), "forward", lambda self, x: forward(self, x) * float("nan"))
    train_step(step_batches, lr=1e-3, measure=False)
    monkeypatch.undo()  # the numbers are sound again: too late for the steps after it
    monkeypatch.setattr(functional, "free_to_read", lambda device: False)
    train_step(step_batches, lr=1e-3, measure=False)
    for one, other in zip(before, train_step.inner.parameters(), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(NotFinite, match="not finite in one of the last steps"):
        train_step(step_batches, lr=1e-3, measure=True)


def test_the_culprit_is_named(settings_of, quiet, far_device):
    train_step, step_batches = ready(settings_of("kd"), quiet)
    name, weight = next((n, p) for n, p in train_step.inner.named_parameters() if "mlp" in n)
    weight.data[0, 0] = float("nan")
    train_step(step_batches, lr=1e-3, measure=False)
    with pytest.raises(NotFinite, match=f"the weight {name} is not finite"):
        train_step.check()


def test_an_optimizer_that_cannot_skip_is_asked_before_each_update(settings_of, quiet, far_device):
    train_step, step_batches = ready(settings_of("kd"), quiet)
    train_step.watch.skips = False
    train_step(step_batches, lr=1e-3, measure=False)
    next(p for n, p in train_step.inner.named_parameters() if "mlp" in n).data[0, 0] = float("nan")
    with pytest.raises(NotFinite):
        train_step(step_batches, lr=1e-3, measure=False)


def _model(kind):
    import transformers as t

    small = {"vocab_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32}
    off = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
    configs = {
        "gpt2": lambda: t.GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=64, n_positions=64, **off),
        "qwen2": lambda: t.Qwen2Config(intermediate_size=48, num_key_value_heads=2, **small),
        "llama": lambda: t.LlamaConfig(intermediate_size=48, **small),
        "opt": lambda: t.OPTConfig(
            ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=64, dropout=0.0, **small
        ),
        "mistral": lambda: t.MistralConfig(intermediate_size=48, num_key_value_heads=2, sliding_window=4, **small),
    }
    torch.manual_seed(0)
    return t.AutoModelForCausalLM.from_config(configs[kind](), attn_implementation="sdpa").eval()


@pytest.mark.parametrize("kind", ["gpt2", "qwen2", "llama", "opt", "mistral"])
def test_without_a_mask_hidden_states_are_those_with_one(kind, monkeypatch):
    model = _model(kind)
    sequences = [TokenSequence((4, 5, 6), (7, 8, 9, 10)), TokenSequence((9,), (5,)), TokenSequence((1, 2), (3, 4, 5))]
    batch = collate(sequences, pad_id=0)
    expected = hidden_rows(model, batch)
    monkeypatch.setattr(functional, "free_to_read", lambda device: False)
    seen = []
    layer = next(m for m in model.modules() if type(m).__name__.endswith("Attention"))
    layer.register_forward_pre_hook(lambda *_: seen.append(implementation(model)))
    torch.testing.assert_close(hidden_rows(model, batch), expected, rtol=1e-5, atol=1e-6)
    assert seen == ["sdpa" if kind == "mistral" else CAUSAL]  # a window needs its mask
    assert implementation(model) == "sdpa"
