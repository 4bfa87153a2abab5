"""Toy models and a set, made once for all tests of evaluation."""

from __future__ import annotations

import json

import pytest
import torch

WORDS = ["red", "blue", "green", "old", "new", "big", "small", "cat", "dog", "tree", "house", "river", "sings", "runs"]


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Two byte-level Llamas of different weights, and a set with short and long references."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("evaluation")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<eos>", special=True)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")
    config = LlamaConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        vocab_size=257,
        bos_token_id=256,
        eos_token_id=256,
        max_position_embeddings=128,
    )
    for seed, name in enumerate(("student", "teacher")):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.mul_(4)
        model.save_pretrained(folder / name)
        fast.save_pretrained(folder / name)
    rows = [
        {"prompt": " ".join(WORDS[i % 7 : i % 7 + 1 + i % 3]), "response": " ".join(WORDS[i % 5 : i % 5 + 1 + i % 4])}
        for i in range(12)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
