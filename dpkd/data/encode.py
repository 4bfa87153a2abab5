"""Examples to prompts and responses in tokens, what does not fit left out and counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dpkd.data.encoding import encode, encode_continuations, prompt_prefix, require_eos
from dpkd.data.formats import Example
from dpkd.data.settings import DataSettings
from dpkd.data.templates import Form, Rendered, chat_lead, render
from dpkd.errors import DpkdError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Prompt:
    """A prompt in tokens (BOS included, if the tokenizer adds one), the data's response, and all references.

    `response_ids` end with EOS unless the response was cut; empty when there is no response. `text` is the
    prompt as it was written.
    """

    id: str
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    references: tuple[str, ...]
    text: str


@dataclass(frozen=True)
class DataReport:
    """What became of the examples. Tokens include BOS and EOS; `longest` is prompt and response together."""

    examples: int
    kept: int
    dropped: dict[str, int]
    cut: int
    tokens: int
    response_tokens: int
    longest: int
    max_tokens: int

    def lines(self) -> list[str]:
        """For printing: what was kept, dropped and cut, and the sizes."""
        sizes = f"{self.tokens:,} tokens, {self.response_tokens:,} in responses, the longest {self.longest:,}"
        return [
            f"{self.kept:,} of {self.examples:,} examples kept: {sizes}",
            *(f"dropped {count:,}: {reason}" for reason, count in self.dropped.items()),
            *([f"cut {self.cut:,}: responses that end at {self.max_tokens:,} tokens, without EOS"] if self.cut else []),
        ]

    def sentence(self) -> str:
        """The same in one line."""
        return "; ".join(self.lines())


@dataclass(frozen=True)
class EncodedData:
    """Prompts in the order of the examples, and the report."""

    prompts: list[Prompt]
    report: DataReport


def tokenize(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    settings: DataSettings,
    *,
    require_response: bool = True,
) -> EncodedData:
    """Write, encode and filter the examples.

    EOS is appended to a response once, and is part of it. Raises DpkdError when a template cannot write a
    prompt, when a required response is missing, and when nothing is left.
    """
    eos_id = require_eos(tokenizer)
    rendered = [render(example, settings.template, tokenizer) for example in examples]
    prompt_ids = _encode_prompts(rendered, tokenizer)
    response_ids = _encode_responses(examples, rendered, tokenizer, eos_id, require_response)
    prompts: list[Prompt] = []
    dropped: Counter[str] = Counter()
    cut = 0
    for example, text, prompt, response in zip(examples, rendered, prompt_ids, response_ids, strict=True):
        if reason := _why_dropped(example, prompt, settings):
            dropped[reason] += 1
            continue
        room = settings.max_tokens - len(prompt)
        cut += len(response) > room
        prompts.append(Prompt(example.id, prompt, tuple(response[:room]), example.references, text.text))
    if not prompts:
        raise _nothing_left(len(examples), dropped)
    return EncodedData(prompts, _report(len(examples), prompts, dropped, cut, settings.max_tokens))


def _by_form(rendered: Sequence[Rendered]) -> dict[Form, list[int]]:
    groups: dict[Form, list[int]] = {}
    for i, one in enumerate(rendered):
        groups.setdefault(one.form, []).append(i)
    return groups


def _encode_prompts(rendered: Sequence[Rendered], tokenizer: PreTrainedTokenizerBase) -> list[tuple[int, ...]]:
    """A chat template writes its own BOS, a ready prompt may; in instructions special tokens are text."""
    own_prefix = prompt_prefix(tokenizer)
    results: list[tuple[int, ...]] = [()] * len(rendered)
    for form, indices in _by_form(rendered).items():
        encoded = encode(tokenizer, [rendered[i].text for i in indices], special=form != "alpaca")
        for i, ids in zip(indices, encoded, strict=True):
            has_prefix = form == "chat" or tuple(ids[: len(own_prefix)]) == own_prefix
            results[i] = tuple(ids) if has_prefix else (*own_prefix, *ids)
    return results


def _encode_responses(
    examples: Sequence[Example],
    rendered: Sequence[Rendered],
    tokenizer: PreTrainedTokenizerBase,
    eos_id: int,
    require_response: bool,
) -> list[list[int]]:
    """Ids up to and with EOS, uncut; an empty list where there is no response."""
    results: list[list[int]] = [[] for _ in examples]
    for form, indices in _by_form(rendered).items():
        lead = chat_lead(tokenizer) if form == "chat" else ""
        with_response = [i for i in indices if examples[i].references]
        if require_response and len(with_response) < len(indices):
            bare = next(i for i in indices if not examples[i].references)
            raise DpkdError(f"{examples[bare].id}: this row has no response to train on.")
        texts = [lead + examples[i].references[0].removesuffix(str(tokenizer.eos_token)) for i in with_response]
        encoded = encode_continuations(tokenizer, texts, special=form == "none")
        for i, ids in zip(with_response, encoded, strict=True):
            end = ids.index(eos_id) if eos_id in ids else len(ids)  # a ready response may write its own EOS
            results[i] = [*ids[:end], eos_id]
    return results


def _why_dropped(example: Example, prompt_ids: Sequence[int], settings: DataSettings) -> str | None:
    if len(prompt_ids) > settings.max_prompt_tokens:
        return f"prompts longer than {settings.max_prompt_tokens:,} tokens"
    fewest = settings.min_response_words
    if fewest and example.references and len(example.references[0].split()) <= fewest:
        return f"responses of at most {fewest:,} words"
    return None if prompt_ids else "prompts without a token"


def _nothing_left(count: int, dropped: Counter[str]) -> DpkdError:
    reasons = "; ".join(f"{number:,} {reason}" for reason, number in dropped.items()) or "there were no examples"
    return DpkdError(
        f"none of {count:,} examples is left: {reasons}. Raise data.max_prompt_tokens, or lower "
        "data.min_response_words."
    )


def _report(count: int, prompts: list[Prompt], dropped: Counter[str], cut: int, max_tokens: int) -> DataReport:
    response_tokens = sum(len(p.response_ids) for p in prompts)
    lengths = [len(p.prompt_ids) + len(p.response_ids) for p in prompts]
    return DataReport(count, len(prompts), dict(dropped), cut, sum(lengths), response_tokens, max(lengths), max_tokens)
