"""Whether two tokenizers are one and the same, verified and not assumed, and which ids both models have."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from dpkd.errors import DpkdError

__all__ = ["SharedVocabulary", "shared_vocabulary", "tokenizer_fingerprint"]

# Texts on which tokenizers of one vocabulary still differ: merges, spaces, numbers, accents, scripts, newlines.
PROBES = (
    "The quick brown fox jumps over 13 lazy dogs.",
    "  two  spaces\tand a tab\n\nnew paragraph",
    "naïve café — “quotes” … 12,345.67 €",
    "def f(x):\n    return x ** 2  # code",
    "東京は日本の首都です。 Привет, мир! 🙂",
    "unbelievableness antidisestablishmentarianism aaaaaa",
)
_SPECIALS = ("bos_token_id", "eos_token_id", "unk_token_id")


@dataclass(frozen=True)
class SharedVocabulary:
    """The ids 0 … size-1 that both models have; `note` says what was cut, if anything."""

    size: int
    note: str | None = None


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Hash of the vocabulary, the special ids, and the encodings of the probe texts."""
    facts = [
        sorted(tokenizer.get_vocab().items()),
        [getattr(tokenizer, name) for name in _SPECIALS],
        [_encode(tokenizer, text) for text in PROBES],
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def shared_vocabulary(student: Any, teacher: Any, student_size: int, teacher_size: int) -> SharedVocabulary:
    """The ids that both models can predict, given tokenizers and rows of the output heads.

    Equal sizes prove nothing and different sizes may be padding (151,936 against 152,064), so the tokenizers decide:
    they must have the same vocabulary, special ids and encodings. Raises DpkdError where they differ.
    """
    difference = _difference(student, teacher)
    if difference:
        raise DpkdError(
            f"student and teacher have different tokenizers: {difference}. Token by token they cannot be compared. "
            "Choose a teacher of the student's family, or make the student from the teacher "
            "(student.init=layers student.layers=N), or train on the teacher's text alone (dpkd sample, then --loss sft)."
        )
    used = max(student.get_vocab().values()) + 1
    smallest = min(student_size, teacher_size)
    if used > smallest:
        raise DpkdError(
            f"the tokenizer uses ids up to {used - 1:,}, but the {'student' if student_size < teacher_size else 'teacher'}'s "
            f"output head has only {smallest:,} rows: model and tokenizer do not belong together"
        )
    if student_size == teacher_size:
        return SharedVocabulary(student_size)
    return SharedVocabulary(
        used,
        f"vocabulary: the student's head has {student_size:,} rows and the teacher's {teacher_size:,}; "
        f"the tokenizers are the same, so both are cut to its {used:,} ids",
    )


def _difference(student: Any, teacher: Any) -> str | None:
    """The first thing in which two tokenizers differ, in words."""
    own, other = student.get_vocab(), teacher.get_vocab()
    if own != other:
        odd = min(set(own.items()) ^ set(other.items()), key=lambda item: (item[1], item[0]))[0]
        return (
            f"the student's has {len(own):,} tokens and the teacher's {len(other):,}; the token {odd!r} is "
            f"{own.get(odd, 'absent')} for the student and {other.get(odd, 'absent')} for the teacher"
        )
    for name in _SPECIALS:
        if getattr(student, name) != getattr(teacher, name):
            return f"{name} is {getattr(student, name)} for the student and {getattr(teacher, name)} for the teacher"
    for text in PROBES:
        if _encode(student, text) != _encode(teacher, text):
            return f"the text {text!r} is encoded differently"
    return None
