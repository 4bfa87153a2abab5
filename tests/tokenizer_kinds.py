"""Tokenizers of both kinds, built here, and the real ones where they are present (else the test is skipped)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

SHARED = Path(os.environ.get("DPKD_SHARED", Path(__file__).parents[2] / "shared"))
REAL = {
    "gpt2": "tokenizers/gpt2",
    "opt": "tokenizers/opt",
    "stories260K": "models/stories260K",
    "aidreams260K": "models/aidreams260K",
}


def byte_tokenizer():
    """Like GPT-2's: every byte a token, nothing added, pad equal to EOS."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    model.add_special_tokens([AddedToken("<eos>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<eos>", pad_token="<eos>")


def piece_tokenizer():
    """Like Llama's: BOS in front, and a space before whatever is encoded."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz:#."]
    vocab = {token: i for i, token in enumerate(tokens)}
    model = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    model.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    model.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    model.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=model, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>"
    )


def real_tokenizer(name: str):
    from transformers import AutoTokenizer

    folder = SHARED / REAL[name]
    if not folder.exists():
        pytest.skip(f"{folder} is not here (DPKD_SHARED)")
    return AutoTokenizer.from_pretrained(folder)


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
