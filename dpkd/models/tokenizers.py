"""Whether two tokenizers are one and the same, verified and not assumed, and which ids both models have."""

from __future__ import annotations

import hashlib
import json
from itertools import count
from typing import Any

from dpkd.api.teachers import SharedVocabulary
from dpkd.errors import DpkdError

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
    they must have the same vocabulary, special ids and encodings. Raises DpkdError where they differ, or where a head
    has fewer rows than the tokenizer has ids.
    """
    what = difference(student, teacher)
    if what:
        raise DpkdError(f"student and teacher have different tokenizers: {what}")
    used = max(student.get_vocab().values()) + 1
    for who, size in (("student", student_size), ("teacher", teacher_size)):
        if used > size:
            raise DpkdError(
                f"the tokenizer uses ids up to {used - 1:,}, but the {who}'s output head has only {size:,} rows: "
                "model and tokenizer do not belong together. Use the tokenizer that the model was trained with, "
                "or remove the tokens that were added to it."
            )
    if student_size == teacher_size:
        return SharedVocabulary(student_size)
    return SharedVocabulary(
        used,
        f"vocabulary: the student's head has {student_size:,} rows and the teacher's {teacher_size:,}; "
        f"the tokenizers are the same, so both are truncated to its {used:,} ids",
    )


_INCOMPARABLE = (
    "Token-level losses cannot compare them. Choose a loss that works across tokenizers (--loss uld or gold), or a "
    "teacher of the student's family, or make the student from the teacher (student.init=layers student.layers=N), or "
    "train on the teacher's text alone (--loss seqkd)."
)
_RENAMED = (
    "The vocabulary is the same, so they can be compared: set teacher.tokenizer to the student's model, to use its "
    "special tokens for both."
)


def difference(student: Any, teacher: Any) -> str | None:
    """The first thing in which two tokenizers differ, and what to do about it, in words; None: they are the same."""
    if student is teacher:
        return None
    own, other = student.get_vocab(), teacher.get_vocab()
    if own != other:
        odd = min(set(own.items()) ^ set(other.items()), key=lambda item: (item[1], item[0]))[0]
        return (
            f"the student's has {len(own):,} tokens and the teacher's {len(other):,}; the token {odd!r} is "
            f"{own.get(odd, 'absent')} for the student and {other.get(odd, 'absent')} for the teacher. {_INCOMPARABLE}"
        )
    for text in PROBES:
        ours, theirs = _encode(student, text), _encode(teacher, text)
        if ours != theirs:
            place = next(i for i in count() if ours[i : i + 1] != theirs[i : i + 1])
            return (
                f"they have the same tokens, but encode the text {text!r} differently from token {place} on: "
                f"{_token(student, ours, place)} for the student and {_token(teacher, theirs, place)} for the teacher. "
                f"{_INCOMPARABLE}"
            )
    for name in _SPECIALS:
        ours, theirs = getattr(student, name), getattr(teacher, name)
        if ours != theirs:
            return f"{name} is {ours} for the student and {theirs} for the teacher. {_RENAMED}"
    return None


def _token(tokenizer: Any, ids: list[int], place: int) -> str:
    return repr(tokenizer.convert_ids_to_tokens(ids[place])) if place < len(ids) else "the end"
