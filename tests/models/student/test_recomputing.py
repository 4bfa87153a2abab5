"""Activations computed again in backward: the same gradients, and less memory the more of them."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from dpkd.models.student_init import recompute_activations
from dpkd.train.memory_trace import backbone_passes

MODELS = {
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(
            n_layer=3, n_embd=32, n_head=2, vocab_size=64, n_positions=64, attn_pdrop=0, resid_pdrop=0, embd_pdrop=0
        )
    ),
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2)
    ),
}


def made(kind, how):
    torch.manual_seed(0)
    model = MODELS[kind]().train()
    if how != "keep":
        recompute_activations(model, selective=how == "selective")
    return model


@pytest.mark.parametrize("kind", MODELS)
def test_gradients_are_the_same(kind):
    ids = torch.arange(40).view(2, 20)
    found = []
    for how in ("keep", "selective", "all"):
        model = made(kind, how)
        model(input_ids=ids, labels=ids).loss.backward()
        found.append([p.grad for p in model.parameters()])
    for others in found[1:]:
        for one, other in zip(found[0], others, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("kind", MODELS)
def test_selective_keeps_less_than_everything_and_more_than_nothing(kind):
    with FakeTensorMode():
        keep, some, none = (
            backbone_passes(made(kind, how), 4, 64, bf16=False).kept for how in ("keep", "selective", "all")
        )
    assert none < some < keep
