"""The numbers of a store on disk: safetensors shards, memory-mapped, each with a list of what it holds.

    FOLDER/shard-00000.safetensors   logps [M], and for topk ids [M, K], top [M, K], rest [M]; for sampled ids [M, K]
    FOLDER/shard-00000.json          [[key, first row, rows], ...]: a key is a hash of prompt and response ids

A shard is there once its list is: both are renamed into place, the list last, so that an interrupted writer loses at
most one shard.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dpkd.errors import DpkdError


def sequence_key(ids: Sequence[int], response_tokens: int) -> str:
    """A hash of the ids of prompt and response and of where the response begins: safe under any order of the data."""
    text = f"{response_tokens}/{','.join(map(str, ids))}"
    return hashlib.sha256(text.encode()).hexdigest()[:32]


class Shards:
    """Rows of numbers by sequence."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._places: dict[str, tuple[int, int, int]] = {}
        self._open: dict[int, Any] = {}
        self._count = 0
        for number, file in enumerate(sorted(folder.glob("shard-*.json"))):
            for key, first, rows in json.loads(file.read_text(encoding="utf-8")):
                self._places[key] = (number, first, rows)
            self._count = number + 1

    def __contains__(self, key: object) -> bool:
        return key in self._places

    def __len__(self) -> int:
        return len(self._places)

    def read(self, key: str) -> dict[str, Tensor]:
        """The rows of a sequence. Raises DpkdError when the store does not have it."""
        if key not in self._places:
            raise DpkdError(
                f"the store {self.folder} has no numbers for a response of this run: it was written for other data, "
                "another template or other lengths. Write it with `dpkd cache` under the settings of the run."
            )
        shard, first, rows = self._places[key]
        if shard not in self._open:
            self._open[shard] = safe_open(self._file(shard), framework="pt")
        file = self._open[shard]
        return {name: file.get_slice(name)[first : first + rows] for name in file.keys()}  # noqa: SIM118

    def _file(self, number: int) -> Path:
        return self.folder / f"shard-{number:05d}.safetensors"

    def add(self, sequences: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Write one shard."""
        number, places, first = self._count, [], 0
        columns: dict[str, list[Tensor]] = {}
        for key, tensors in sequences.items():
            rows = len(tensors["logps"])
            places.append((key, first, rows))
            first += rows
            for name, values in tensors.items():
                columns.setdefault(name, []).append(values)
        file = self._file(number)
        unfinished = file.with_suffix(".part")
        save_file({name: torch.cat(parts).contiguous() for name, parts in columns.items()}, unfinished)
        unfinished.replace(file)
        listing = file.with_suffix(".json.part")
        listing.write_text(json.dumps(places), encoding="utf-8")
        listing.replace(file.with_suffix(".json"))
        self._places |= {key: (number, start, rows) for key, start, rows in places}
        self._count += 1
