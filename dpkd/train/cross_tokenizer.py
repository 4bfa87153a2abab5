"""Runs whose student and teacher have different tokenizers: what they cannot do, and what they need."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dpkd.api import Family, Signal, Trait
from dpkd.api.inputs import TEACHER_LOGPS
from dpkd.config.objective import Objective
from dpkd.config.resolve import Resolved
from dpkd.config.text import teacher_reasons
from dpkd.cross_tokenizer.retokenize import Retokenizer, TextTokenizer
from dpkd.cross_tokenizer.union_vocabulary import UnionVocabulary, unite
from dpkd.data.encode import Prompt, tokenize
from dpkd.data.formats import Example
from dpkd.data.settings import DataSettings
from dpkd.errors import DpkdError
from dpkd.models.loading import context_length

UNLIMITED = 10**9


def token_by_token(resolved: Resolved) -> list[str]:
    """What in a run compares the two models token by token, or hands one's tokens to the other, in words."""
    settings, reasons = resolved.settings, []
    for objective in resolved.objectives:
        if _needs_one_tokenizer(objective):
            reasons.append(f"the loss {objective.spec.name} compares the two models token by token")
        if not objective.shares_text:
            path = "text" if objective.name == "main" else f"terms.extra.{objective.name}.text"
            reasons += teacher_reasons(objective.text, path)
    if settings.terms.pretrain.weight > 0 and settings.terms.pretrain.kd_ratio > 0:
        reasons.append("terms.pretrain.kd_ratio distils token by token")
    return reasons


def _needs_one_tokenizer(objective: Objective) -> bool:
    if objective.spec.family is Family.ROLLOUT:
        return True
    of_teacher = {Signal.TEACHER_LOGITS, Signal.TEACHER_HIDDEN, *TEACHER_LOGPS}
    reads_teacher = bool(of_teacher & objective.reads)
    return reads_teacher and Trait.ACROSS_TOKENIZERS not in objective.spec.traits


def make_retokenizer(
    tokenizer: Any,
    teacher_tokenizer: Any,
    teacher_config: Any,
    examples: Sequence[Example],
    prompts: Sequence[Prompt],
    data: DataSettings,
) -> Retokenizer:
    """Both tokenizers, and the run's prompts in the teacher's tokens: its own chat template, else the same text.

    Raises DpkdError when a tokenizer's tokens do not spell text, and when the teacher reads less than a prompt.
    """
    student, teacher = TextTokenizer(tokenizer), TextTokenizer(teacher_tokenizer)
    wide = {"max_prompt_tokens": UNLIMITED - 1, "max_tokens": UNLIMITED, "min_response_words": 0}
    kept = {prompt.id for prompt in prompts}
    used = [example for example in examples if example.id in kept]
    read = tokenize(used, teacher_tokenizer, data.model_copy(update=wide), require_response=False).prompts
    by_id = {prompt.id: prompt for prompt in read}
    longest = context_length(teacher_config)
    for prompt in prompts:
        own = by_id.get(prompt.id)
        if own is None:
            raise DpkdError(f"{prompt.id}: the prompt has no token in the teacher's tokenizer")
        if longest is not None and len(own.prompt_ids) >= longest:
            raise DpkdError(
                f"{prompt.id}: the prompt has {len(own.prompt_ids):,} tokens in the teacher's tokenizer, and the "
                f"teacher reads {longest:,}: no room for a response. Lower data.max_prompt_tokens "
                f"(it has {len(prompt.prompt_ids):,} of the student's tokens)."
            )
    return Retokenizer(student, teacher, [by_id[prompt.id] for prompt in prompts], longest)


def union_of(retokenizer: Retokenizer, student_rows: int, teacher_rows: int) -> UnionVocabulary:
    """The tokens of both models, given the rows of their output heads; see `unite`."""
    return unite(retokenizer.student, retokenizer.teacher, student_rows, teacher_rows)
