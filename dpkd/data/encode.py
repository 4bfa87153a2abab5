"""Examples to prompts and responses in tokens, what does not fit left out and counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dpkd.data.encoding import encode, encode_continuations, prompt_prefix, require_eos
from dpkd.data.formats import Example
from dpkd.data.settings import DataSettings
from dpkd.data.templates import Form, Rendered, chat_lead, render, template_line
from dpkd.data.token_cache import RowIds, remembered_ids
from dpkd.errors import DpkdError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Prompt:
    """A prompt in tokens (BOS included, if the tokenizer adds one), the data's response, and all references.

    `response_ids` end with EOS unless the response was cut; empty when there is no response. `text` is the
    prompt as it was written. `rejected_ids` are those of the other response of a pair, where there is one, and
    `teacher` is the name of the row's teacher, where the data has it.
    """

    id: str
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    references: tuple[str, ...]
    text: str
    rejected_ids: tuple[int, ...] = ()
    teacher: str | None = None


@dataclass(frozen=True)
class DataReport:
    """What became of the examples. Tokens include BOS and EOS; `longest` is prompt and response together.

    templates  which of them wrote how many prompts, in a sentence
    lengths    advice where much is dropped or cut for its length
    glued      a warning: prompts that run into their response, with the text of one
    """

    examples: int
    kept: int
    dropped: dict[str, int]
    cut: int
    tokens: int
    response_tokens: int
    longest: int
    max_tokens: int
    templates: str
    lengths: str | None
    glued: str | None

    def lines(self) -> list[str]:
        """For printing: what was kept, dropped and cut, and the sizes."""
        sizes = f"{self.tokens:,} tokens, {self.response_tokens:,} in responses, the longest {self.longest:,}"
        return [
            self.templates,
            f"{self.kept:,} of {self.examples:,} examples kept: {sizes}",
            *(f"dropped {count:,}: {reason}" for reason, count in self.dropped.items()),
            *(
                [f"truncated {self.cut:,}: responses longer than {self.max_tokens:,} tokens, without EOS"]
                if self.cut
                else []
            ),
            *([self.lengths] if self.lengths else []),
            *([self.glued] if self.glued else []),
        ]


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
    context: int | None = None,
) -> EncodedData:
    """Write, encode and filter the examples; `context` is how many tokens the models read, for advice.

    EOS is appended to a response once, and is part of it. Raises DpkdError when a template cannot write a
    prompt, when a required response is missing, and when nothing is left.
    """
    eos_id = require_eos(tokenizer)
    rendered = [render(example, settings.template, tokenizer) for example in examples]
    if require_response and (bare := next((e for e in examples if not e.references), None)):
        raise DpkdError(f"{bare.id}: this row has no response to train on.")
    responses = [example.references[0] if example.references else None for example in examples]
    rejected = [example.rejected for example in examples]
    prompt_ids, response_ids, rejected_ids = remembered_ids(
        [(one.text, one.form, *both) for one, *both in zip(rendered, responses, rejected, strict=True)],
        tokenizer,
        lambda: RowIds(
            _encode_prompts(rendered, tokenizer),
            _encode_responses(responses, rendered, tokenizer, eos_id),
            _encode_responses(rejected, rendered, tokenizer, eos_id),
        ),
    )
    prompts: list[Prompt] = []
    dropped: Counter[str] = Counter()
    cut = 0
    rows = zip(examples, rendered, prompt_ids, response_ids, rejected_ids, strict=True)
    for example, text, prompt, response, other in rows:
        if reason := _why_dropped(example, prompt, settings):
            dropped[reason] += 1
            continue
        room = settings.max_tokens - len(prompt)
        cut += max(len(response), len(other)) > room
        ids = (response[:room], other[:room])
        prompts.append(Prompt(example.id, prompt, ids[0], example.references, text.text, ids[1], example.teacher))
    if not prompts:
        reasons = "; ".join(f"{number:,} {reason}" for reason, number in dropped.items()) or "there were no examples"
        raise DpkdError(
            f"none of {len(examples):,} examples is left: {reasons}. Raise data.max_prompt_tokens, or lower "
            "data.min_response_words."
        )
    sizes = [len(p.prompt_ids) + max(len(p.response_ids), len(p.rejected_ids)) for p in prompts]
    whole = [(len(p), max(len(r), len(o))) for p, r, o in zip(prompt_ids, response_ids, rejected_ids, strict=True)]
    report = DataReport(
        examples=len(examples),
        kept=len(prompts),
        dropped=dict(dropped),
        cut=cut,
        tokens=sum(sizes),
        response_tokens=sum(len(p.response_ids) for p in prompts),
        longest=max(sizes),
        max_tokens=settings.max_tokens,
        templates=template_line((one.form for one in rendered), settings.template),
        lengths=_length_advice(whole, settings, context),
        glued=_glued(rendered, responses),
    )
    return EncodedData(prompts, report)


def check_ids(prompts: Iterable[Prompt], rows: int, who: str) -> None:
    """Raises DpkdError for a token that a model has no embedding for; `rows` is the number that it has."""
    for prompt in prompts:
        most = max(*prompt.prompt_ids, *prompt.response_ids, *prompt.rejected_ids, 0)
        if most >= rows:
            raise DpkdError(
                f"{prompt.id}: contains the token {most:,}, but {who} has embeddings for {rows:,} only: model and "
                "tokenizer do not belong together. Use the tokenizer that the model was trained with."
            )


MUCH = 0.1  # of the examples, dropped or cut


def _length_advice(lengths: Sequence[tuple[int, int]], settings: DataSettings, context: int | None) -> str | None:
    """What would keep 99 of 100 examples whole, where the limits drop or cut many; lengths of prompt and response.

    Where the models read no more than `context` tokens, what they can read.
    """

    def fit(prompt: int, both: int) -> int:
        return sum(p <= prompt and p + r <= both for p, r in lengths)

    whole = fit(settings.max_prompt_tokens, settings.max_tokens)
    if len(lengths) - whole < MUCH * len(lengths):
        return None
    last = (len(lengths) * 99 - 1) // 100
    prompt = max(settings.max_prompt_tokens, sorted(p for p, _ in lengths)[last])
    both = max(settings.max_tokens, prompt + 1, sorted(p + r for p, r in lengths)[last])
    said = f"warning: {len(lengths) - whole:,} of {len(lengths):,} examples are dropped or cut for their length"
    if context is None or both <= context:
        return (
            f"{said}; 99 of 100 fit into --set data.max_prompt_tokens={prompt} --set data.max_tokens={both}, "
            "where memory allows it"
        )
    both = max(settings.max_tokens, context)
    prompt = max(settings.max_prompt_tokens, min(prompt, context // 2))
    reads = f"the models read at most {context:,} tokens"
    if (more := fit(prompt, both)) == whole:
        return f"{said}; {reads}, so that no setting keeps more of them whole"
    return f"{said}; {reads}: {more:,} fit into --set data.max_prompt_tokens={prompt} --set data.max_tokens={both}"


def _glued(rendered: Sequence[Rendered], responses: Sequence[str | None]) -> str | None:
    """A warning where ready prompts run into their responses: the model would see one word in place of two."""
    found = [
        (one.text, response)
        for one, response in zip(rendered, responses, strict=True)
        if one.form == "none" and response and one.text[-1:].isalnum() and response[:1].isalnum()
    ]
    if not found:
        return None
    prompt, response = found[0]
    return (
        f"warning: {len(found):,} of {len(rendered):,} prompts join their response without a space or line break, "
        f"as in {prompt[-40:] + '⟦' + response[:40] + '⟧'!r}. End prompts, or begin responses, with one, or choose a "
        "template: --set data.template=alpaca"
    )


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
    texts: Sequence[str | None], rendered: Sequence[Rendered], tokenizer: PreTrainedTokenizerBase, eos_id: int
) -> list[tuple[int, ...]]:
    """Ids up to and with EOS, uncut; none where there is no response."""
    results: list[tuple[int, ...]] = [() for _ in texts]
    for form, indices in _by_form(rendered).items():
        lead = chat_lead(tokenizer) if form == "chat" else ""
        given = [(i, text) for i in indices if (text := texts[i]) is not None]
        whole = [lead + text.removesuffix(str(tokenizer.eos_token)) for _, text in given]
        encoded = encode_continuations(tokenizer, whole, special=form == "none")
        for (i, _), ids in zip(given, encoded, strict=True):
            end = ids.index(eos_id) if eos_id in ids else len(ids)  # a ready response may write its own EOS
            results[i] = (*ids[:end], eos_id)
    return results


def _why_dropped(example: Example, prompt_ids: Sequence[int], settings: DataSettings) -> str | None:
    if len(prompt_ids) > settings.max_prompt_tokens:
        return f"prompts longer than {settings.max_prompt_tokens:,} tokens"
    fewest = settings.min_response_words
    if fewest and example.references and len(example.references[0].split()) <= fewest:
        return f"responses of at most {fewest:,} words"
    return None if prompt_ids else "prompts without a token"
