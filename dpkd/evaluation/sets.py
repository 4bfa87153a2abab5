"""Sets to evaluate on: any file, folder or hub id, or one of the papers' five by name."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dpkd.data.hub import local_only
from dpkd.data.memory import is_memory
from dpkd.data.rows import READERS
from dpkd.data.sources import HUB_ID
from dpkd.errors import DpkdError
from dpkd.io import read_json

FOLDER_VARIABLE = "DPKD_SETS"
# What a held-out split may be called, best first; MiniLLM's `valid` is its test split. `train` is for sets that have
# no other split, as files on the hub get that name when nothing else is said.
SPLITS = ("test", "eval", "valid", "validation", "val", "dev", "train")


@dataclass(frozen=True)
class EvalSet:
    """Where a set is, and what the block `data` is for it where the user says nothing else."""

    name: str
    path: str
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def given(self, run: Mapping[str, Any], flags: Mapping[str, Any]) -> dict[str, Any]:
        """The block `data`: what the model's run says, below what the set says, below flags (None: not given)."""
        return {**run, **self.defaults, "path": self.path, **{k: v for k, v in flags.items() if v is not None}}


def _papers(name: str, path: str, **more: Any) -> EvalSet:
    """MiniLLM §3.1 and its scripts: the Alpaca prompt, at most 256 tokens of it, and 512 in all."""
    limits = {"max_prompt_tokens": 256, "max_tokens": 512}
    return EvalSet(name, path, {"template": "alpaca", "columns": {}, **limits, **more})


# S-NI and UnNI: the rows whose reference has 11 words or more (MiniLLM's split `11_`).
SETS = {
    one.name: one
    for one in (
        _papers("dolly", "MiniLLM/dolly"),
        _papers("self-inst", "MiniLLM/self-inst"),
        _papers("vicuna", "MiniLLM/Vicuna"),
        _papers("sinst", "MiniLLM/sinst", min_response_words=10),
        _papers("uinst", "MiniLLM/uinst", min_response_words=10),
    )
}


def find_set(data: str, folder: str | None = None) -> EvalSet:
    """The set of a path, a hub id, or one of the papers' names; a path that exists wins over a name.

    The papers' sets are looked for in `folder` (or `$DPKD_SETS`) as NAME.jsonl or a folder NAME, else on the hub.
    Of a folder or a hub data set with several splits, the test split is meant (`data.split` says otherwise).
    Raises DpkdError when the folder does not have the set.
    """
    if is_memory(data):
        return EvalSet(data.rpartition(":")[2], data)
    if Path(data).exists() or data not in SETS:
        return _with_split(EvalSet(_name(data), data))
    place = folder or os.environ.get(FOLDER_VARIABLE)
    if place is None:
        return _with_split(SETS[data])
    for candidate in (Path(place) / f"{data}.jsonl", Path(place) / data):
        if candidate.exists():
            return _with_split(replace(SETS[data], path=str(candidate)))
    raise DpkdError(f"the set {data} is not in {place}: expected {data}.jsonl or a folder {data} there")


def _name(data: str) -> str:
    """What results are filed under: `dolly/eval.jsonl` is dolly, `dolly/dev.jsonl` is dolly-dev, `eval.jsonl` eval."""
    path = Path(data)
    name = path.stem if path.suffix.lower() in READERS else path.name
    if name.lower() not in SPLITS or path.parent.name in ("", ".."):
        return name
    return path.parent.name if name.lower() in ("test", "eval") else f"{path.parent.name}-{name}"


def _with_split(one: EvalSet) -> EvalSet:
    splits = _splits(one.path)
    split = next((name for name in SPLITS if name in splits), None)
    return one if split is None else replace(one, defaults={**one.defaults, "split": split})


def _splits(path: str) -> set[str]:
    """The splits of a folder, by the names of its files, or of a hub data set; empty where there is nothing to ask."""
    folder = Path(path)
    if folder.is_dir():
        saved = folder / "dataset_dict.json"
        if saved.exists():
            splits = read_json(saved).get("splits", ())
            return set(map(str, splits)) if isinstance(splits, list) else set()
        return _of_files(folder, folder.rglob("*"))
    if folder.exists() or folder.suffix.lower() in READERS or not HUB_ID.fullmatch(path):
        return set()
    import datasets

    try:
        with local_only():
            return set(map(str, datasets.get_dataset_split_names(path)))
    except Exception:  # whatever is wrong is said when the rows are read
        return {"test"}


def _of_files(folder: Path, files: Iterable[Path]) -> set[str]:
    parts = (part for f in files if f.suffix.lower() in READERS for part in f.relative_to(folder).parts)
    return {re.split(r"[-_.]", part)[0].lower() for part in parts}
