"""Texts to ids, so that prompt ids followed by response ids spell prompt and response with any tokenizer.

Prompt and response are encoded apart: the prompt of training is, token for token, that of sampling.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dpkd.errors import DpkdError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Encoded before a response and taken off again. The empty one is tried first: most tokenizers need none.
ANCHORS = ("", "\n", ":", "x")


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, special: bool = False) -> list[list[int]]:
    """Ids of texts, nothing added. `special`: `</s>` in a text is the token; otherwise it is spelled out."""
    if not texts:
        return []
    encoded = tokenizer(
        list(texts),
        add_special_tokens=False,
        return_attention_mask=False,
        split_special_tokens=not special,
        verbose=False,
    )
    return [list(ids) for ids in encoded["input_ids"]]


def prompt_prefix(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """What the tokenizer itself puts before a text: BOS or nothing. What it puts after (EOS) is left out.

    Found by comparing an encoding with and without the tokenizer's own additions.
    """
    (plain,) = encode(tokenizer, ["x"])
    ids = list(tokenizer("x")["input_ids"])
    starts = (i for i in range(len(ids) - len(plain) + 1) if ids[i : i + len(plain)] == plain)
    return tuple(ids[: next(starts, 0)])


def encode_continuations(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, special: bool = False
) -> list[list[int]]:
    """Ids of texts that follow another text.

    SentencePiece tokenizers (Llama) put a space before whatever they encode. Text that continues another has
    none: it is encoded behind an anchor, whose ids are then taken off.
    """
    results: list[list[int]] = [[] for _ in texts]
    remaining = list(range(len(texts)))
    for anchor in (*(anchor for anchor in ANCHORS if _continues(tokenizer, anchor)), ""):
        (front,) = encode(tokenizer, [anchor])
        encoded = encode(tokenizer, [anchor + texts[i] for i in remaining], special=special)
        merged = []  # texts whose start became one token with the anchor's end: the next anchor is tried
        for i, ids in zip(remaining, encoded, strict=True):
            results[i] = ids[len(front) :]
            if ids[: len(front)] != front:
                merged.append(i)
        remaining = merged
    return results


def _continues(tokenizer: PreTrainedTokenizerBase, anchor: str) -> bool:
    """Whether text encoded behind the anchor decodes without a space of the tokenizer's own."""
    before, front = encode(tokenizer, ["a:", anchor])
    for text in ("b", " b"):
        (ids,) = encode(tokenizer, [anchor + text])
        if ids[: len(front)] != front:
            return False
        if _decode(tokenizer, before + ids[len(front) :]) != _decode(tokenizer, before) + text:
            return False
    return True


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def continuation(
    tokenizer: PreTrainedTokenizerBase, before: Sequence[int], ids: Sequence[int], *, special: bool = False
) -> str:
    """The text of ids that continue others, with the space that it begins with: SentencePiece drops it at a start.

    `special`: EOS and the like are spelled out.
    """

    def decode(some: Sequence[int]) -> str:
        text = tokenizer.decode(list(some), skip_special_tokens=not special, clean_up_tokenization_spaces=False)
        return str(text)

    start, whole = decode(before), decode([*before, *ids])
    # A character that is cut between the two has no text of its own yet: the plain text is the best there is.
    return whole[len(start) :] if whole.startswith(start) else decode(ids)


def end_ids(tokenizer: PreTrainedTokenizerBase, model: Any = None) -> frozenset[int]:
    """All ids that end a response: the tokenizer's EOS, and those of a model's generation config.

    `model` is the model or its generation config; None: the tokenizer alone. Chat models often end a turn with one
    token and a text with another, and `generate` stops at both. Raises DpkdError when these are no ids.
    """
    ids = getattr(getattr(model, "generation_config", model), "eos_token_id", None)
    more = ids if isinstance(ids, list | tuple) else [] if ids is None else [ids]
    if not all(isinstance(one, int) and 0 <= one < 2**31 for one in more):
        raise DpkdError(
            f"{getattr(model, 'name_or_path', '')}: expected token ids as `eos_token_id` in generation_config.json, "
            f"found {str(ids)[:60]!r}. Correct it, or remove it: the tokenizer's EOS then ends a response."
        )
    return frozenset({require_eos(tokenizer), *more})


def require_eos(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that ends a response. Raises DpkdError when the tokenizer has none."""
    if tokenizer.eos_token_id is None:
        name = tokenizer.name_or_path or "(unnamed)"
        raise DpkdError(
            f"the tokenizer {name} has no EOS token: a response could never end. "
            "Set `eos_token` in its tokenizer_config.json."
        )
    return int(tokenizer.eos_token_id)
