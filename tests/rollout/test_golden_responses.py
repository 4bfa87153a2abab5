"""Responses of version 0.1.0, token by token: a faster sampler still draws them.

`golden_responses.json` was written by 0.1.0's sampler, whose caches grew by concatenation. Run this file to write it
again; that is right only where responses are meant to change.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, OPTConfig

from dpkd.api import SamplingSettings
from dpkd.rollout import cache_layers
from dpkd.rollout.sampling import sample

FILE = Path(__file__).with_name("golden_responses.json")
VOCABULARY = 61
CONFIGS = {
    "gpt2": GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2, n_positions=96),
    "llama": LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=96,
    ),
    "opt": OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        ffn_dim=64,
        max_position_embeddings=96,
        word_embed_proj_dim=32,
    ),
}
# Name of the case: model, settings of sampling, arguments of `sample`.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "plain-gpt2": ("gpt2", {}, {}),
    "plain-llama": ("llama", {}, {}),
    "plain-opt": ("opt", {}, {}),
    "greedy": ("llama", {"temperature": 0.0}, {}),
    "top-k": ("gpt2", {"top_k": 7, "temperature": 1.4}, {}),
    "top-p": ("llama", {"top_p": 0.7}, {}),
    "filters": ("gpt2", {"top_p": 0.8, "top_k": 9, "temperature": 0.8}, {}),
    "teacher-mix": ("gpt2", {}, {"mix": 0.3}),
    "teacher-veto": ("gpt2", {"top_p": 0.9}, {"veto": 6}),
    "several": ("llama", {"batch_size": 5}, {"num_generations": 3}),
    "long": ("gpt2", {"max_new_tokens": 80}, {"eos_ids": {7}}),
    "vocabulary": ("gpt2", {}, {"vocabulary": 40, "eos_ids": {9}}),
}


def model_of(family: str, seed: int = 0) -> Any:
    """A float32 model whose next-token distributions are far from uniform."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[family]).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(6.0 if any(part in name for part in ("emb", "wte", "head")) else 3.0)
    return model


def responses(case: str, **more: Any) -> list[dict[str, Any]]:
    family, settings, changes = CASES[case]
    chance = np.random.default_rng(1)
    prompts = [chance.integers(1, 40, length).tolist() for length in (5, 2, 14, 9, 9, 1, 23, 6, 3, 11, 12)]
    count = len(prompts) * changes.get("num_generations", 1)
    arguments = {"eos_ids": {3, 17, 30}, "pad_id": 0, "seeds": range(40, 40 + count), **changes, **more}
    if {"mix", "veto"} & arguments.keys():
        arguments["mix_with"] = model_of("llama", seed=1)
    drawn = sample(
        model_of(family), prompts, SamplingSettings(**{"max_new_tokens": 24, "batch_size": 4, **settings}), **arguments
    )
    return [
        {
            "ids": list(one.response_ids),
            "logps": [round(float(x), 7) for x in one.logps],
            "behaviour": [round(float(x), 7) for x in one.behaviour_logps],
            "truncated": one.truncated,
        }
        for one in drawn
    ]


def assert_golden(case: str, got: list[dict[str, Any]]) -> None:
    for one, want in zip(got, json.loads(FILE.read_text())[case], strict=True):
        assert one["ids"] == want["ids"]
        assert one["truncated"] == want["truncated"]
        np.testing.assert_allclose(one["logps"], want["logps"], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(one["behaviour"], want["behaviour"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("small", [0, cache_layers.SMALL], ids=["in place", "concatenated"])
@pytest.mark.parametrize("case", CASES)
def test_the_responses_are_those_of_the_first_version(case: str, small: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_layers, "SMALL", small)
    assert_golden(case, responses(case))


if __name__ == "__main__":
    lines = [f"{json.dumps(case)}: {json.dumps(responses(case), separators=(',', ':'))}" for case in CASES]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
