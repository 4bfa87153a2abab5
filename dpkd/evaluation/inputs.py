"""The rows of a set as prompts: every row that was read is scored, or left out by a rule and counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dpkd.data.batches import TokenSequence
from dpkd.data.examples import Example, read_examples
from dpkd.data.settings import DataSettings
from dpkd.data.tokenise import Prompt, tokenise
from dpkd.errors import DpkdError
from dpkd.evaluation.sets import EvalSet

__all__ = ["Inputs", "read_inputs"]

UNLIMITED = 10**9


@dataclass(frozen=True)
class Inputs:
    """Prompts in the order of the data; what was left out, by reason; references cut for the divergences."""

    prompts: list[Prompt]
    left_out: dict[str, int]
    cut: int
    rows_read: int
    fingerprint: str

    @property
    def sequences(self) -> list[TokenSequence]:
        """Prompts with their first reference."""
        return [TokenSequence(p.prompt_ids, p.response_ids) for p in self.prompts]

    def lines(self) -> list[str]:
        """For printing."""
        lines = [f"left out {count:,}: {reason}" for reason, count in self.left_out.items()]
        if self.cut:
            lines.append(f"cut {self.cut:,}: references that the model cannot read to their end, for the divergences")
        return lines


def read_inputs(
    one: EvalSet, data: DataSettings, tokenizer: Any, *, context: int | None, max_new_tokens: int
) -> Inputs:
    """Read, filter and tokenise a set; `context` is the longest sequence that the models read.

    Raises DpkdError when a row cannot be scored: a prompt that leaves no room for an answer, or one that is longer than
    the set's rule without being left out by it.
    """
    found = read_examples(data)
    examples = [e for e in found.examples if _words(e) >= one.min_reference_words]
    left_out = Counter(found.skipped_by_reason())
    if short := len(found.examples) - len(examples):
        left_out[f"references of fewer than {one.min_reference_words} words"] = short
    wide = data.model_copy(
        update={"max_prompt_tokens": UNLIMITED - 1, "max_tokens": UNLIMITED, "min_response_words": 0}
    )
    prompts = tokenise(examples, tokenizer, wide).prompts if examples else []
    if one.max_prompt_tokens is not None:
        kept = [p for p in prompts if len(p.prompt_ids) <= one.max_prompt_tokens]
        if dropped := len(prompts) - len(kept):
            left_out[f"prompts longer than {one.max_prompt_tokens:,} tokens"] = dropped
        prompts = kept
    if not prompts:
        raise DpkdError(f"{one.path}: no row is left to score: {dict(left_out) or 'it is empty'}")
    _check_room(one, prompts, context)
    limit = min(limit for limit in (context, one.max_tokens, UNLIMITED) if limit is not None)
    cut = [_cut(p, limit) for p in prompts]
    count = sum(len(a.response_ids) < len(b.response_ids) for a, b in zip(cut, prompts, strict=True))
    return Inputs(cut, dict(left_out), count, len(found.examples) + len(found.skipped), found.fingerprint)


def _words(example: Example) -> int:
    return len(example.references[0].split()) if example.references else 0


def _check_room(one: EvalSet, prompts: Sequence[Prompt], context: int | None) -> None:
    too_long = [p for p in prompts if context is not None and len(p.prompt_ids) >= context]
    if too_long:
        first = too_long[0]
        raise DpkdError(
            f"{one.path}: {len(too_long)} of {len(prompts)} prompts leave no room for an answer: {first.id} has "
            f"{len(first.prompt_ids):,} tokens, and the model reads at most {context:,}. Every row is to be scored: "
            f"leave them out, and have them counted, with --max-prompt-tokens {(context or 2) // 2}"
        )


def _cut(prompt: Prompt, limit: int) -> Prompt:
    room = limit - len(prompt.prompt_ids)
    if len(prompt.response_ids) <= room:
        return prompt
    return Prompt(prompt.id, prompt.prompt_ids, prompt.response_ids[: max(1, room)], prompt.references, prompt.text)
