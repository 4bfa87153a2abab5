"""Activations and norms by one kernel each: the same numbers and weights, where it is the same function."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from transformers import AutoModelForCausalLM, GemmaConfig, GPT2Config, LlamaConfig, OPTConfig, Qwen3Config

from dpkd.models import fused_layers
from dpkd.models.fused_layers import fuse_layers, unfuse_layers

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = SIZES | {"intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 8}
# With the number of modules that have a kernel of their own.
MODELS = {
    "gpt2": (GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64), 2),
    "llama": (LlamaConfig(**LLAMA), 5),
    "qwen3": (Qwen3Config(**LLAMA), 9),
    "gemma": (GemmaConfig(**LLAMA), 2),  # its norms multiply by 1 + weight: the activations alone
    "opt": (OPTConfig(**SIZES, ffn_dim=64, word_embed_proj_dim=32), 0),  # ReLU, and torch's LayerNorm
}


@pytest.fixture
def here(monkeypatch):
    monkeypatch.setattr(fused_layers, "FUSED_ON", ("cpu",))


def passes(model):
    """Logits, and the gradient of every weight."""
    model.zero_grad()
    logits = model(torch.arange(24).view(2, 12)).logits
    (logits * torch.arange(logits.numel()).sin().view_as(logits)).sum().backward()
    return [logits.detach(), *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_computes_the_same_with_fewer_kernels(family, dtype, here):
    torch.manual_seed(0)
    config, count = MODELS[family]
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    for p in model.parameters():  # norms begin at 1, as if they had no weight
        p.data += 0.1 * torch.randn_like(p)
    before, names, classes = passes(model), [*model.state_dict()], [type(m) for m in model.modules()]
    assert fuse_layers(model) == count
    assert fuse_layers(model) == 0
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    for now, then in zip(passes(deepcopy(model)), before, strict=True):
        assert (now.float() - then.float()).abs().max() <= tolerance * then.float().abs().max()
    assert [*model.state_dict()] == names
    assert [type(m).__name__ for m in model.modules()] == [one.__name__ for one in classes]
    unfuse_layers(model)
    assert [type(m) for m in model.modules()] == classes


def test_nothing_happens_on_a_cpu():
    model = AutoModelForCausalLM.from_config(MODELS["llama"][0])
    assert fuse_layers(model) == 0


def test_a_model_of_the_caller_is_left_as_it_was(here):
    from dpkd.models.in_memory import InMemory, InMemoryModel
    from dpkd.models.settings import ModelSettings

    model = AutoModelForCausalLM.from_config(MODELS["llama"][0])
    classes = [type(m) for m in model.modules()]
    in_memory = InMemory({"own": InMemoryModel(model, None)})
    with in_memory.left_alone():
        loaded = in_memory.load(ModelSettings(model="own"), device="cpu", dtype=None)
        assert loaded is model
        assert [type(m) for m in model.modules()] != classes
    assert [type(m) for m in model.modules()] == classes
