"""What the runs of one process share: loaded models, tokenizers and tokenized rows, each found by who it is.

Made once by whoever runs several runs, and passed to each of them as `in_memory`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from dpkd.io import sha256
from dpkd.models.in_memory import InMemory
from dpkd.models.settings import ModelSettings

T = TypeVar("T")

# Models that stay loaded: a teacher to train with and one to evaluate with, a student's start, one that is evaluated.
MOST_MODELS = 4
MOST_ROWS = 8  # tokenized data sets that stay


@dataclass(frozen=True)
class Shared(InMemory):
    """Models and tokenized rows that were used before are used again; the longest unused ones are dropped.

    All of them come from disk or hub: its runs have nothing else in memory.
    """

    _kept_models: OrderedDict[Hashable, Any] = field(default_factory=OrderedDict, repr=False)
    _kept_rows: OrderedDict[Hashable, Any] = field(default_factory=OrderedDict, repr=False)
    _tokenizers: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    def tokenizer(self, settings: ModelSettings) -> Any:
        """The tokenizer itself, read once for all folders with the same files: nobody changes it."""
        name = getattr(settings, "tokenizer", None) or settings.model
        key = (settings.revision, settings.trust_remote_code, _files_of(name))
        if key not in self._tokenizers:
            self._tokenizers[key] = super().tokenizer(settings)
        return self._tokenizers[key]

    def load(self, settings: ModelSettings, *, device: torch.device | str, dtype: torch.dtype | None) -> Any:
        """The model itself, for all who ask: nobody trains it."""
        who = settings.model_dump_json(exclude={"tokenizer", "settings"})  # a student's has its layers as well
        key = (self.fingerprint(settings), who, str(device), dtype)
        return _kept(
            self._kept_models, key, lambda: InMemory.load(self, settings, device=device, dtype=dtype), MOST_MODELS
        )

    def load_copy(self, settings: ModelSettings, *, device: torch.device | str, dtype: torch.dtype | None) -> Any:
        """A copy of the model, to be trained."""
        return deepcopy(self.load(settings, device=device, dtype=dtype))

    def remembered(self, key: Hashable, make: Callable[[], T]) -> T:
        """What was made for a key before."""
        return _kept(self._kept_rows, key, make, MOST_ROWS)


def _kept(cache: OrderedDict[Hashable, Any], key: Hashable, make: Callable[[], T], most: int) -> T:
    """The value of a key, made where it is not there; the longest unused value goes when there are too many."""
    if key not in cache:
        while len(cache) >= most:  # before another is made: two of them may not fit
            cache.popitem(last=False)
        cache[key] = make()
    cache.move_to_end(key)
    value: T = cache[key]
    return value


def _files_of(name: str | None) -> tuple[Any, ...]:
    """What decides a tokenizer: the files of a folder that it is read from, or the name of a hub.

    The models that runs save have one tokenizer in many folders.
    """
    path = Path(name or "")
    if path.is_file():
        stat = path.stat()
        return str(path), stat.st_size, stat.st_mtime_ns
    kinds = (".json", ".txt", ".model", ".jinja", ".py")
    files = sorted(p for p in path.glob("*") if p.suffix in kinds and p.is_file()) if name else []
    return tuple((file.name, sha256(file)) for file in files) or (name,)
