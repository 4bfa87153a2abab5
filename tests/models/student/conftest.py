"""Tiny teachers of the four families, with weights that no initialisation would give."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, OPTConfig, Qwen2Config

SHARED = Path(os.environ.get("DPKD_SHARED", Path(__file__).parents[4] / "shared"))
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}


def config_named(family: str) -> Any:
    """A configuration of 6 layers."""
    match family:
        case "llama":
            return LlamaConfig(**SIZES)
        case "llama-tied":
            return LlamaConfig(**SIZES, tie_word_embeddings=True)
        case "qwen2":
            # Full attention below layer 3, a window of 4 tokens above: layer types differ.
            return Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=4, max_window_layers=3)
        case "gpt2":
            return GPT2Config(
                vocab_size=64, n_embd=16, n_layer=6, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
            )
        case "opt":
            return OPTConfig(
                vocab_size=64,
                hidden_size=16,
                ffn_dim=24,
                num_hidden_layers=6,
                num_attention_heads=4,
                max_position_embeddings=64,
                word_embed_proj_dim=16,
                layerdrop=0.1,
                attention_dropout=0.1,
            )
    raise KeyError(family)


def build_model(family: str) -> Any:
    """A model whose every weight, biases and norms too, is perturbed at random."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config_named(family))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


@pytest.fixture(params=["llama", "llama-tied", "qwen2", "gpt2", "opt"])
def teacher(request: pytest.FixtureRequest) -> Any:
    return build_model(request.param)


@pytest.fixture
def llama() -> Any:
    return build_model("llama")


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(2))


@pytest.fixture
def tokenizer() -> Any:
    """Words of one letter, and a chat template."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", *"abcdefgh"])}
    model = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    model.add_special_tokens([AddedToken(token, special=True) for token in ("<unk>", "<s>", "</s>")])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=model, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )
    tokenizer.chat_template = "{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}"
    return tokenizer


@pytest.fixture
def shared_stories() -> str:
    """The folder of a real small Llama of 5 layers, or a skip."""
    folder = SHARED / "models" / "stories260K"
    if not folder.is_dir():
        pytest.skip(f"no {folder}: set DPKD_SHARED to the folder of the shared models")
    return str(folder)
