"""The sampler `vllm` against a stand-in that imitates vLLM's documented interface. No GPU, no vLLM."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from dpkd.api import Ability, GenerationModel, SamplingTask
from dpkd.errors import DpkdError
from dpkd.models.lora import add_lora
from dpkd.models.settings import LoraSettings
from dpkd.rollout.backends.hf import HfSampler
from dpkd.rollout.backends.vllm import SPEC, VllmConfig, VllmSampler

VOCABULARY, EOS = 23, frozenset({3, 5, 9, 11, 17, 20})
PROMPTS = [[1, 2, 3], [4], [7, 8, 1, 2, 6]]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch):
    """The stand-in's module, found as an installed package would be."""
    shutil.copy(Path(__file__).parents[1] / "fake_vllm.py", tmp_path / "vllm.py")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    import vllm

    yield vllm
    sys.modules.pop("vllm", None)


def tiny(seed: int = 2, size: int = VOCABULARY) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=40,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    return model


def writer(model: Any, **more: Any) -> GenerationModel:
    return GenerationModel(model, **{"vocabulary": VOCABULARY, "eos_ids": EOS, "pad_id": 0, **more})


def task(**more: Any) -> SamplingTask:
    count = len(PROMPTS) * more.get("num_generations", 1)
    return SamplingTask(PROMPTS, **{"seeds": range(50, 50 + count), "max_new_tokens": 9, "batch_size": 2, **more})


def log_q(model: Any, prompt: list[int], response: tuple[int, ...], vocabulary: int) -> np.ndarray:
    """Log-prob of each response token by one pass over all, in NumPy."""
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *response]]), use_cache=False).logits[0].double().numpy()
    rows = logits[len(prompt) - 1 : -1, :vocabulary]
    shifted = rows - rows.max(-1, keepdims=True)
    return (shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))[np.arange(len(response)), list(response)]


@pytest.mark.parametrize("sleep", [True, False])
def test_greedy_text_is_that_of_the_model_itself(fake, sleep: bool) -> None:
    model = tiny()
    engine = VllmSampler(writer(model), VllmConfig(sleep=sleep))
    engine.refresh()
    mine = engine.draw(task(temperature=0.0, logps=False))
    theirs = HfSampler(writer(model), VllmConfig()).draw(task(temperature=0.0))
    assert [s.response_ids for s in mine] == [s.response_ids for s in theirs]
    assert [s.truncated for s in mine] == [s.truncated for s in theirs]
    assert len({len(s.response_ids) for s in mine}) > 1


def test_log_probs_are_the_models_over_the_shared_vocabulary(fake) -> None:
    model = tiny(size=VOCABULARY + 6)
    drawn = VllmSampler(writer(model), VllmConfig()).draw(task(num_generations=3))
    for place, sampled in enumerate(drawn):
        assert max(sampled.response_ids) < VOCABULARY
        want = log_q(model, PROMPTS[place // 3], sampled.response_ids, VOCABULARY)
        np.testing.assert_allclose(sampled.logps, want, atol=1e-5)
        assert sampled.behaviour_logps is sampled.logps
        assert sampled.truncated == (sampled.response_ids[-1] not in EOS)
    assert {s.truncated for s in drawn} == {True, False}


def test_a_seed_decides_a_response_wherever_it_stands(fake) -> None:
    sampler = VllmSampler(writer(tiny()), VllmConfig())
    drawn = sampler.draw(task(num_generations=2))
    assert len({s.response_ids for s in drawn}) == len(drawn)
    (again,) = sampler.draw(SamplingTask(PROMPTS[1:2], seeds=[53], max_new_tokens=9))
    assert again == drawn[3]


def test_each_refresh_takes_the_weights_over_and_sleep_gives_memory_back(fake) -> None:
    model = tiny()
    sampler = VllmSampler(writer(model), VllmConfig())
    (engine,) = fake.ENGINES
    before = sampler.draw(task(temperature=0.0))
    with torch.no_grad():
        model.lm_head.weight.mul_(-1)
    sampler.refresh()
    after = sampler.draw(task(temperature=0.0))
    assert before != after
    assert [s.response_ids for s in after] == [
        s.response_ids for s in HfSampler(writer(model), VllmConfig()).draw(task(temperature=0.0))
    ]
    # One request more after each handover: the log-probs of a few tokens are compared with the model's.
    checked = ["generate 1", "generate 3"]
    once = ["wake ['weights']", "weights", "reset", "wake ['kv_cache']", *checked, "sleep"]
    assert engine.log == ["sleep", *once, *once]


def test_adapters_are_merged_into_what_the_engine_gets(fake) -> None:
    model = add_lora(tiny(), LoraSettings(r=2, alpha=16))
    plain = HfSampler(writer(model), VllmConfig()).draw(task(temperature=0.0))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(3))
    mine = VllmSampler(writer(model), VllmConfig()).draw(task(temperature=0.0))
    theirs = HfSampler(writer(model), VllmConfig()).draw(task(temperature=0.0))
    assert [s.response_ids for s in mine] == [s.response_ids for s in theirs]
    assert plain != theirs
    assert any("lora_B" in name for name, _ in model.named_parameters())


def test_room_and_refusals(fake) -> None:
    model = tiny()
    seen = []
    sampler = VllmSampler(writer(model, context=6), VllmConfig())
    drawn = sampler.draw(task(), lambda place, s: seen.append((place, s)))
    assert [len(p) + len(s.response_ids) <= 6 for p, s in zip(PROMPTS, drawn, strict=True)] == [True] * 3
    assert seen == list(enumerate(drawn))
    with pytest.raises(DpkdError, match="prompt 2 has 5 tokens, and the model reads at most 5"):
        VllmSampler(writer(model, context=5), VllmConfig()).draw(task())
    with pytest.raises(DpkdError, match="no teacher mix: its engine holds one model"):
        sampler.draw(task(mix_with=model, mix=0.2))
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    with pytest.raises((DpkdError, RuntimeError), match=r"not numbers|nan"):
        VllmSampler(writer(model), VllmConfig()).draw(task(temperature=0.0))
    sampler.close()


def test_without_the_package_it_says_what_to_install() -> None:
    assert "pip install 'dpkd[vllm]'" in (SPEC.missing() or "")
    with pytest.raises(DpkdError, match="vllm is not installed"):
        VllmSampler(writer(tiny()), VllmConfig())
    assert set(SPEC.lacks) == {Ability.TEACHER_MIX, Ability.FILTERED_LOGPS, Ability.QUANTIZED}
