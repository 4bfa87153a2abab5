"""Tokenizers built here, tiny models in folders, and the real ones where they are present."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SHARED = Path(os.environ.get("DPKD_SHARED", Path(__file__).parents[3] / "shared"))


def build_tokenizer(*extra: str, merges: tuple[tuple[str, str], ...] = (), **specials: str) -> Any:
    """Bytes as tokens, then the results of the merges, `<eos>`, and the extra tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = sorted(pre_tokenizers.ByteLevel.alphabet()) + sorted({"".join(pair) for pair in merges})
    model = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=list(merges)))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    model.add_special_tokens([AddedToken(token, special=True) for token in ("<eos>", *extra)])
    return PreTrainedTokenizerFast(tokenizer_object=model, **{"eos_token": "<eos>", **specials})


@pytest.fixture
def tokenizer_of() -> Callable[..., Any]:
    return build_tokenizer


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole model folder: an untied Llama of 2 layers with noisy weights, and its tokenizer (257 ids, no pad)."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    folder = tmp_path_factory.mktemp("tiny") / "llama"
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        bos_token_id=256,
        eos_token_id=256,
        pad_token_id=None,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def shared_model() -> Callable[[str], str]:
    """The folder of a real small model, or a skip."""

    def find(name: str) -> str:
        folder = SHARED / "models" / name
        if not folder.is_dir():
            pytest.skip(f"no {folder}: set DPKD_SHARED to the folder of the shared models")
        return str(folder)

    return find
