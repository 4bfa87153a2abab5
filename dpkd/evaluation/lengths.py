"""How long a text is, and the buckets of reference length that the papers report by.

The DPKD paper splits DollyEval at 30 and 70, "median and mean of the response lengths", but of what? In
white-space words the responses of DollyEval have median 33 and mean 72, so words are the default here; the
other unit is tokens. The unit is part of every result.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from dpkd.errors import DpkdError, SettingsError

DEFAULT_CUTS = (30, 70)


@dataclass(frozen=True)
class LengthMeasure:
    """A way to count: the unit's name, and the length of a text in it."""

    unit: str
    count: Callable[[str], int]


def word_count(text: str) -> int:
    """Words between white space.

    >>> word_count("To be,  or not")
    4
    """
    return len(text.split())


WORDS = LengthMeasure("words", word_count)


def tokens_of(folder: Path | str) -> LengthMeasure:
    """Length in tokens of a tokenizer on disk, without special tokens.

    Raises DpkdError when no tokenizer can be loaded from the folder.
    """
    from transformers import AutoTokenizer

    if not Path(folder).is_dir():
        raise DpkdError(f"--tokenizer {folder}: expected a folder with the files of a tokenizer, found no such folder")
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the library raises many types for a bad folder, from KeyError to OSError
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DpkdError(
            f"--tokenizer {folder}: no tokenizer could be loaded from this folder ({reason}). "
            "Expected tokenizer.json, or the vocabulary files, beside tokenizer_config.json."
        ) from error
    return tokens_by(tokenizer)


def tokens_by(tokenizer: Any) -> LengthMeasure:
    """Length in tokens of a tokenizer, without special tokens."""
    # verbose=False: texts longer than the model's context are counted, not warned about.
    encode = partial(tokenizer.encode, add_special_tokens=False, verbose=False)
    return LengthMeasure("tokens", lambda text: len(encode(text)))


def parse_cuts(text: str) -> tuple[int, ...]:
    """`"30,70"` as numbers; an empty text means no buckets.

    Raises SettingsError unless they are whole, positive and rising.

    >>> parse_cuts("30,70")
    (30, 70)
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise SettingsError([f"--cuts {text!r}: expected whole numbers separated by commas, such as 30,70"])
    return checked_cuts([int(part) for part in parts])


def checked_cuts(cuts: Sequence[int]) -> tuple[int, ...]:
    """The cuts, once they are known to be positive and rising. Raises SettingsError otherwise."""
    if any(cut < 1 for cut in cuts) or any(a >= b for a, b in pairwise(cuts)):
        found = ",".join(str(cut) for cut in cuts)
        raise SettingsError([f"length cuts {found}: expected numbers of at least 1, each above the one before it"])
    return tuple(cuts)


def bucket_of(length: int, cuts: Sequence[int]) -> int:
    """Index of the bucket that holds a length; upper ends belong to their bucket, length 0 to the first.

    >>> [bucket_of(n, (30, 70)) for n in (0, 30, 31, 70, 71)]
    [0, 0, 1, 1, 2]
    """
    return bisect_left(cuts, length)


def bucket_labels(cuts: Sequence[int]) -> tuple[str, ...]:
    """Names of the buckets, in order.

    >>> bucket_labels((30, 70))
    ('(0,30]', '(30,70]', '(70,∞)')
    """
    lower = (0, *cuts)
    return (*(f"({a},{b}]" for a, b in zip(lower, cuts, strict=False)), f"({lower[-1]},∞)")
