"""The rows of a set as prompts: every row that was read is scored, or left out by a rule of the user and counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from dpkd.data.batches import TokenSequence
from dpkd.data.encode import Prompt, tokenize
from dpkd.data.examples import read_examples
from dpkd.data.formats import Example
from dpkd.data.settings import DataSettings
from dpkd.data.wording import COMMAND_LINE, Wording
from dpkd.errors import DpkdError

LongPrompts = Literal["error", "skip"]
UNLIMITED = 10**9


@dataclass(frozen=True)
class Inputs:
    """Prompts in the order of the data, and what is to be known of them.

    skipped  rows left out, by reason
    cut      references that were cut, for the divergences only
    tight    prompts that leave less room for an answer than its length limit
    """

    prompts: list[Prompt]
    skipped: dict[str, int]
    cut: int
    tight: int
    rows_read: int
    fingerprint: str
    source: str

    @property
    def sequences(self) -> list[TokenSequence]:
        """Prompts with their first reference."""
        return [TokenSequence(p.prompt_ids, p.response_ids) for p in self.prompts]

    def lines(self) -> list[str]:
        """For printing."""
        lines = [f"skipped {count:,} of {self.rows_read:,} rows: {reason}" for reason, count in self.skipped.items()]
        if self.cut:
            lines.append(
                f"truncated {self.cut:,} references for the likelihood and the divergences; text metrics use them whole"
            )
        if self.tight:
            lines.append(f"{self.tight:,} prompts leave less room for an answer in the model than the length limit")
        return lines


def read_inputs(
    data: DataSettings,
    tokenizer: Any,
    *,
    context: int | None,
    max_new_tokens: int,
    long_prompts: LongPrompts = "error",
    rows: Iterable[Any] | None = None,
    teacher_column: str | None = None,
    wording: Wording = COMMAND_LINE,
) -> Inputs:
    """Read and tokenize a set; `context` is the longest sequence that the models read, `rows` those in memory.

    `teacher_column` has the name of each row's teacher; `wording` is what messages call settings and options.

    Rows are left out, and counted, by `data.on_bad_row=skip`, `data.min_response_words` and `long_prompts="skip"`, and
    by nothing else. Raises DpkdError when a prompt is longer than `data.max_prompt_tokens`, or leaves no room for an
    answer, and when no row is left.
    """
    # A conversation has one answer to score, its last.
    found = read_examples(
        data.model_copy(update={"mix": (), "train_on": "last"}),
        rows=rows,
        teacher_column=teacher_column,
        wording=wording,
    )
    skipped = Counter(found.skipped_by_reason())
    read = _encoded(found.examples, tokenizer, data, skipped)
    longest = min(data.max_prompt_tokens, context - 1 if context is not None else UNLIMITED)
    prompts = [p for p in read if len(p.prompt_ids) <= longest]
    if len(prompts) < len(read):
        if long_prompts == "error":
            raise _too_long([p for p in read if len(p.prompt_ids) > longest], len(read), data, context, wording)
        skipped[f"prompts longer than {longest:,} tokens"] = len(read) - len(prompts)
    rows_read = len(found.examples) + len(found.skipped)
    if not prompts:
        why = "; ".join(f"{count:,} {reason}" for reason, count in skipped.items())
        raise DpkdError(f"{data.path}: no row of {rows_read:,} is left to score: {why}")
    if len(prompts) + skipped.total() != rows_read:
        raise DpkdError(f"{data.path}: {rows_read} rows were read, but {len(prompts)} kept and {skipped} left out")
    most = min(data.max_tokens, context if context is not None else UNLIMITED)
    fitting = [replace(p, response_ids=p.response_ids[: most - len(p.prompt_ids)]) for p in prompts]
    cut = sum(len(a.response_ids) < len(b.response_ids) for a, b in zip(fitting, prompts, strict=True))
    tight = sum(context is not None and len(p.prompt_ids) + max_new_tokens > context for p in prompts)
    return Inputs(fitting, dict(skipped), cut, tight, rows_read, found.fingerprint, found.source)


def _encoded(found: Sequence[Example], tokenizer: Any, data: DataSettings, skipped: Counter[str]) -> list[Prompt]:
    """Prompts of any length, but for those with too short a reference, which are counted in `skipped`."""
    examples = [e for e in found if _words(e) > data.min_response_words or not data.min_response_words]
    if short := len(found) - len(examples):
        skipped[f"first references of at most {data.min_response_words:,} words"] = short
    if not examples:
        return []
    wide = {"max_prompt_tokens": UNLIMITED - 1, "max_tokens": UNLIMITED, "min_response_words": 0}
    tokenized = tokenize(examples, tokenizer, data.model_copy(update=wide))
    skipped.update(tokenized.report.dropped)
    return tokenized.prompts


def _words(example: Example) -> int:
    return len(example.references[0].split())


def _too_long(
    long: Sequence[Prompt], count: int, data: DataSettings, context: int | None, wording: Wording
) -> DpkdError:
    """Which prompts, and what to set so that they are scored, or left out."""
    most = max(len(p.prompt_ids) for p in long)
    first = f"the first is {long[0].id} with {len(long[0].prompt_ids):,} tokens, the longest has {most:,}"
    verb = "is" if len(long) == 1 else "are"
    skip = f"To skip and count such rows: {wording.long_prompts}"
    beyond = [p for p in long if context is not None and len(p.prompt_ids) >= context]
    if beyond:
        return DpkdError(
            f"{data.path}: {len(long):,} of {count:,} prompts {verb} too long, and {len(beyond):,} of them leave no "
            f"room for an answer in a model that reads {context:,} tokens ({first}). Every row that is read is to be "
            f"scored. {skip}"
        )
    wanted = {"max_prompt_tokens": most, **({"max_tokens": most + 256} if most >= data.max_tokens else {})}
    return DpkdError(
        f"{data.path}: {len(long):,} of {count:,} prompts {verb} longer than data.max_prompt_tokens="
        f"{data.max_prompt_tokens:,} ({first}). Every row must be scored: {wording.settings(**wanted)}. {skip}"
    )
