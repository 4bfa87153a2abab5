"""What each token of a vocabulary spells, in bytes: the common ground of two tokenizers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from dpkd.data.encoding import encode_continuations
from dpkd.errors import DpkdError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBE = "The old dog, 13 cats: a house."
SPACE = "▁"  # SentencePiece's
BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def token_pieces(tokenizer: PreTrainedTokenizerBase) -> list[bytes | None]:
    """The bytes that each id adds to a text `[V]`; None for special tokens, and for ids that are no token.

    Raises DpkdError for a tokenizer whose tokens do not each spell a part of the text (WordPiece, say).
    """
    spell = _speller(tokenizer)
    vocabulary = tokenizer.get_vocab()
    pieces: list[bytes | None] = [None] * (max(vocabulary.values()) + 1)
    for token, number in vocabulary.items():
        pieces[number] = spell(token)
    for number, added in tokenizer.added_tokens_decoder.items():
        pieces[number] = None if added.special else added.content.encode()
    for number in tokenizer.all_special_ids:
        pieces[number] = None
    (ids,) = encode_continuations(tokenizer, [PROBE])
    if spelled(pieces, ids) != PROBE.encode():
        raise _unknown(tokenizer, f"its tokens of {PROBE!r} spell {spelled(pieces, ids)!r}")
    return pieces


def spelled(pieces: Sequence[bytes | None], ids: Sequence[int]) -> bytes:
    """The bytes that ids spell, up to the first that is no text."""
    parts: list[bytes] = []
    for number in ids:
        piece = pieces[number] if number < len(pieces) else None
        if piece is None:
            break
        parts.append(piece)
    return b"".join(parts)


def _speller(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], bytes | None]:
    """How the tokenizer's own decoder spells a token. Raises DpkdError when that is not known here."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _unknown(tokenizer, "it is Python code, without a tokenizer.json")
    decoder = json.loads(backend.to_str()).get("decoder") or {}
    steps = {step["type"]: step for step in decoder.get("decoders", [decoder]) if "type" in step}
    if "ByteLevel" in steps:
        return _byte_level
    replaces = steps.get("Replace", {}).get("pattern", {}).get("String") == SPACE
    if replaces or steps.get("Metaspace", {}).get("replacement") == SPACE:
        return _with_byte_fallback if "ByteFallback" in steps else _sentencepiece
    raise _unknown(tokenizer, f"its decoder is {', '.join(steps) or 'none'}")


def _unknown(tokenizer: PreTrainedTokenizerBase, why: str) -> DpkdError:
    return DpkdError(
        f"the tokenizer {tokenizer.name_or_path or '(unnamed)'} cannot be aligned with another: {why}. Known are "
        "byte-level BPE (GPT-2, Llama-3, Qwen) and SentencePiece (Llama-2, Mistral, Gemma) in a tokenizer.json."
    )


def _sentencepiece(token: str) -> bytes:
    return token.replace(SPACE, " ").encode()


def _with_byte_fallback(token: str) -> bytes:
    byte = BYTE.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else _sentencepiece(token)


def _byte_level(token: str) -> bytes | None:
    alphabet = _alphabet()
    return bytes(alphabet[c] for c in token) if all(c in alphabet for c in token) else None


@cache
def _alphabet() -> dict[str, int]:
    """GPT-2's letters for bytes: those that can be seen stand for themselves, the others for U+0100 and on."""
    seen = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (number for number in range(256) if number not in seen)
    return {chr(n): n for n in seen} | {chr(0x100 + i): n for i, n in enumerate(others)}
