"""The memory of a plan: bytes counted by hand, parts known exactly, and what makes a run smaller."""

from __future__ import annotations

import os

import pytest
import torch
from rich.console import Console
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from dpkd.api import LossConfig, Signal, TokenLoss
from dpkd.train import memory
from dpkd.train.memory import memory_estimate
from dpkd.train.memory_trace import LiveBytes, backbone_passes, token_chunk
from dpkd.train.prepare import prepare
from dpkd.train.progress import Display

KIB = 1024


def estimate(resolved):
    return memory_estimate(resolved, prepare(resolved, Display(Console(quiet=True))))


def test_bytes_are_counted_while_tensors_are_there():
    with LiveBytes() as live:
        first = torch.zeros(KIB // 4)  # 1 KiB
        second = first + 1  # 1 KiB more
        first.view(2, -1).add_(1)  # a view, in place: nothing
        del first
        assert (live.now, live.peak) == (KIB, 2 * KIB)
        del second
        torch.zeros(5, KIB // 4)
    assert (live.now, live.peak) == (0, 5 * KIB)


@pytest.mark.parametrize("fake", [True, False])
def test_a_linear_layer_keeps_what_its_formula_says(fake):
    """y = tanh(x W + b): backward reads x, W and tanh(x W + b); dW, db and dx come."""
    import contextlib

    with FakeTensorMode() if fake else contextlib.nullcontext():
        linear = torch.nn.Linear(64, 64)
        with LiveBytes() as live:
            x = torch.ones(32, 64)
            y = torch.tanh(linear(x))
            assert live.now == 4 * 2 * 32 * 64
            y.sum().backward()
            del x, y
        assert live.now == 4 * (64 * 64 + 64)


@pytest.mark.parametrize(
    "make",
    [
        lambda: GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=64, n_positions=32)),
        lambda: LlamaForCausalLM(
            LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
        ),
    ],
)
def test_without_memory_the_passes_are_those_of_the_real_model(make):
    with FakeTensorMode():
        fake = backbone_passes(make().train(), 2, 16, bf16=False)
    assert fake == backbone_passes(make().train(), 2, 16, bf16=False)
    assert fake.backward > fake.kept > 0


class _Square(TokenLoss[LossConfig]):
    def forward(self, x):
        return x.student_logits.square().sum(-1)


def test_a_chunk_counts_the_copies_of_a_loss():
    """Logits, the square, log-probs to measure, and the gradient: four; the rest of the measuring is on [n]."""
    copies = token_chunk(_Square(LossConfig()), frozenset({Signal.STUDENT_LOGITS}))
    assert copies == pytest.approx(4, abs=0.5)


def test_weights_and_optimiser_are_exact(settings_of):
    parts = estimate(settings_of("fkl")).parts
    # Llama of the fixture: embeddings and head 2 · 257 · 32, per layer 4 · 32² + 3 · 32 · 64 + 2 · 32, last norm 32.
    layer = 4 * 32**2 + 3 * 32 * 64 + 2 * 32
    student, teacher = (2 * 257 * 32 + n * layer + 32 for n in (2, 4))
    assert parts["student weights"] == 4 * student
    assert parts["teacher weights"] == 4 * teacher
    assert parts["optimizer state"] == 8 * student


def test_a_sharded_student_is_spread_over_the_processes_and_gathered_to_sample(settings_of, toy, monkeypatch):
    from transformers import AutoModelForCausalLM

    resolved = settings_of(
        "minillm", {"student.init": "pretrained", "student.layers": None, "student.model": str(toy / "teacher")}
    )
    whole = estimate(resolved).parts
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert estimate(resolved).parts == whole  # DDP: each process has all of it
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    parts = estimate(resolved).parts
    assert parts["optimizer state"] == whole["optimizer state"] / 8
    assert parts["student weights"] == whole["student weights"] / 8
    assert parts["teacher weights"] == whole["teacher weights"]
    model = AutoModelForCausalLM.from_pretrained(toy / "teacher")
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    layers = sum(n for name, n in sizes.items() if ".layers." in name)
    together = 4 * (sum(sizes.values()) - layers + 2 * layers // 4)
    assert parts["gathered layers"] == together


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_each_stage_of_zero_spreads_one_more_part(stage, settings_of, monkeypatch):
    resolved = settings_of("minillm", {"student.init": "layers", "student.layers": 2})
    whole = estimate(resolved).parts
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", str(stage))
    parts = estimate(resolved).parts
    weights = whole["student weights"]
    # DeepSpeed's optimizer updates a copy of the weights, which lies with its state: 4 + 8 bytes a weight of 4.
    assert parts["optimizer state"] == (weights + whole["optimizer state"]) / 8
    assert parts["student weights"] == (weights / 8 if stage == 3 else weights)
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "cpu")
    assert estimate(resolved).parts["optimizer state"] == 0
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "0")
    assert estimate(resolved).parts == whole  # plain data parallelism


@pytest.mark.parametrize("sleep", [True, False])
def test_an_engine_beside_the_student_counts_when_it_draws_or_always(sleep, settings_of, monkeypatch):
    monkeypatch.setattr("dpkd.rollout.backends.vllm.find_spec", lambda name: object())  # as if vLLM were there
    changes = {"text.source": "student", "text.backend": "vllm", "text.backend_settings": {"sleep": sleep}}
    found = estimate(settings_of("jsd", changes))
    assert found.moment != "sampling"  # of the student's activations
    student = found.parts["student weights"] / 4
    assert found.parts.get("engine of the sampler", 0.0) == (0.0 if sleep else 2.0 * student)


def test_the_engine_takes_its_share_of_the_device_and_at_least_its_weights():
    from dpkd.rollout.backends.vllm import VllmConfig, engine_memory

    half = VllmConfig(gpu_memory=0.5, sleep=False)
    assert engine_memory(half, 100, None) == (200.0, 200.0)  # bf16: two bytes a weight
    assert engine_memory(half, 100, 1000) == (500.0, 500.0)
    assert engine_memory(VllmConfig(gpu_memory=0.1, dtype="float32"), 100, 1000) == (400.0, 0.0)  # and it sleeps


def test_the_total_is_that_of_the_largest_moment(settings_of):
    found = estimate(settings_of("dpkd"))
    assert found.total == sum(found.parts.values())
    assert found.moment in ("losses", "backward", "update", "sampling")


LONG = {"train.batch_size": 8, "data.template": "alpaca", "text.sampling.max_new_tokens": 64}


@pytest.mark.parametrize(
    "smaller", [{"student.gradient_checkpointing": True}, {"train.micro_batch_size": 2}, {"student.dropout": "off"}]
)
def test_what_saves_memory_lowers_the_estimate(settings_of, toy, smaller):
    of_gpt2 = {"student.init": "pretrained", "student.layers": None, "student.model": str(toy / "gpt2"), **LONG}
    whole = estimate(settings_of("sft", of_gpt2, teacher=None))
    assert estimate(settings_of("sft", of_gpt2 | smaller, teacher=None)).total < whole.total


def test_adapters_have_little_to_optimise(settings_of):
    pytest.importorskip("peft", reason="peft is an optional dependency")
    whole, adapters = (estimate(settings_of("fkl", change)).parts for change in ({}, {"student.lora.r": 1}))
    assert adapters["optimizer state"] < whole["optimizer state"] / 10


def test_a_model_that_needs_values_is_estimated_all_the_same(settings_of, monkeypatch):
    def needs_values(*_, **__):
        raise RuntimeError("no values")

    exact = estimate(settings_of("fkl", LONG))
    monkeypatch.setattr(memory, "backbone_passes", needs_values)
    rough = estimate(settings_of("fkl", LONG))
    assert rough.total == pytest.approx(exact.total, rel=0.5)


def lengths_of(resolved):
    data = prepare(resolved, Display(Console(quiet=True))).data
    return sorted((len(p.prompt_ids) + len(p.response_ids) for p in data.prompts), reverse=True)


def test_packed_rows_count_the_longest_sequences_at_their_own_lengths(settings_of, monkeypatch):
    batches = []
    passes = memory.backbone_passes
    monkeypatch.setattr(
        memory, "backbone_passes", lambda m, *size, bf16: batches.append(size) or passes(m, *size, bf16=bf16)
    )
    eight = {"train.batch_size": 8, "train.micro_batch_size": 8}
    longest = lengths_of(settings_of("fkl", eight))[:8]
    assert sum(longest) < 0.9 * 8 * longest[0], "else nothing is saved"
    estimate(settings_of("fkl", eight))
    monkeypatch.setattr("dpkd.models.layouts.PACKS_FROM", 1)
    for change in ({}, {"batch.packing": "off"}, {"train.compile": "on"}):
        estimate(settings_of("fkl", eight | change))
    padded, packed = (8, longest[0]), (8, -(-sum(longest) // 8))
    assert batches == [padded, packed, padded, padded]


@pytest.fixture
def glibc(monkeypatch):
    """As on a machine with glibc, of whose malloc nobody has changed anything."""
    for name in [name for name in os.environ if name.startswith("MALLOC_") or name == "LD_PRELOAD"]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(memory.platform, "libc_ver", lambda: ("glibc", "2.36"))


def test_what_malloc_holds_counts_unless_it_is_told_to_return_it(settings_of, glibc, monkeypatch):
    resolved = settings_of("fkl")
    parts = dict(estimate(resolved).parts)
    held = parts.pop(memory.HELD_BY_MALLOC)
    kept = ("student weights", "teacher weights", "optimizer state")
    assert held == pytest.approx(memory.HELD * sum(size for name, size in parts.items() if name not in kept))
    with monkeypatch.context() as told:
        told.setenv("MALLOC_TRIM_THRESHOLD_", "1048576")
        assert estimate(resolved).parts == parts
    with monkeypatch.context() as other:
        other.setattr(memory.platform, "libc_ver", lambda: ("", ""))
        assert estimate(resolved).parts == parts


def test_recomputed_activations_leave_holes_of_what_there_would_be_without(settings_of, glibc):
    plain, again = (estimate(settings_of("fkl", {"student.gradient_checkpointing": on})).parts for on in (False, True))
    assert again["activations"] < 0.5 * plain["activations"]
    assert again[memory.HELD_BY_MALLOC] == pytest.approx(memory.HELD_OF_RECOMPUTED * plain["activations"])
