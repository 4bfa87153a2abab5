"""Sets to evaluate on: any file or hub id, or one of the papers' five by name."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from dpkd.errors import DpkdError

__all__ = ["SETS", "EvalSet", "find_set"]

FOLDER_VARIABLE = "DPKD_SETS"


@dataclass(frozen=True)
class EvalSet:
    """Where a set is, and what of it is used.

    max_prompt_tokens    rows with longer prompts are left out and counted; None: they are an error
    min_reference_words  rows whose first reference is shorter are left out and counted
    """

    name: str
    path: str
    template: str | None = None
    max_prompt_tokens: int | None = None
    max_tokens: int | None = None
    min_reference_words: int = 0


def _papers(name: str, path: str, min_reference_words: int = 0) -> EvalSet:
    """MiniLLM §3.1: the Alpaca prompt, at most 256 tokens of prompt and 512 in all; references of 11 words or more."""
    return EvalSet(name, path, "alpaca", 256, 512, min_reference_words)


SETS = {
    one.name: one
    for one in (
        _papers("dolly", "MiniLLM/dolly"),
        _papers("self-inst", "MiniLLM/self-inst"),
        _papers("vicuna", "MiniLLM/Vicuna"),
        _papers("sinst", "MiniLLM/sinst", 11),
        _papers("uinst", "MiniLLM/uinst", 11),
    )
}


def find_set(data: str, folder: str | None = None) -> EvalSet:
    """The set of a path, a hub id, or one of the papers' names; a path that exists wins over a name.

    The papers' sets are looked for in `folder` (or `$DPKD_SETS`) as NAME.jsonl or a folder NAME, else on the hub.
    Raises DpkdError when the folder does not have the set.
    """
    if Path(data).exists() or data not in SETS:
        path = Path(data)
        return EvalSet(path.parent.name if path.stem in ("train", "test", "valid", "eval", "dev") else path.stem, data)
    named = SETS[data]
    place = folder or os.environ.get(FOLDER_VARIABLE)
    if place is None:
        return named
    for candidate in (Path(place) / f"{data}.jsonl", Path(place) / data):
        if candidate.exists():
            return EvalSet(**{**vars(named), "path": str(candidate)})
    raise DpkdError(f"the set {data} is not in {place}: expected {data}.jsonl or a folder {data} there")
