"""The numbers of a store on disk: safetensors shards, memory-mapped, each with a list of what it holds.

    FOLDER/shard-00000.safetensors   logps [M], and for topk ids [M, K], top [M, K], rest [M]; for sampled ids [M, K]
    FOLDER/shard-00000.json          sha256 of the shard, and sequences: [[key, first row, rows], ...], where a key is
                                     a hash of prompt and response ids

A shard is there once its list is: both are renamed into place, the list last, so that an interrupted writer loses at
most one shard. Opening a store verifies every shard.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dpkd.errors import DpkdError
from dpkd.io import digest, read_json, sha256, storage_errors, whole_file, write_json


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
        for file in sorted(folder.glob("shard-*.json")):
            number = _number(file)
            for key, first, rows in _sequences(file):
                self._places[key] = (number, first, rows)
        self._next = max(map(_number, folder.glob("shard-*")), default=-1) + 1  # a number is never used twice

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
                + self._lost()
            )
        shard, first, rows = self._places[key]
        if shard not in self._open:
            self._open[shard] = safe_open(self._file(shard), framework="pt")
        file = self._open[shard]
        return {name: file.get_slice(name)[first : first + rows] for name in file.keys()}  # noqa: SIM118

    def _lost(self) -> str:
        """Which shards are absent, as a sentence; empty where none is."""
        listed = {_number(file) for file in self.folder.glob("shard-*.json")}
        names = [self._file(number).name for number in range(self._next) if number not in listed]
        return f" {', '.join(names)} or its list is lost: `dpkd cache` computes the missing numbers." if names else ""

    def _file(self, number: int) -> Path:
        return self.folder / f"shard-{number:05d}.safetensors"

    def add(self, sequences: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Write one shard."""
        number, places, first = self._next, [], 0
        columns: dict[str, list[Tensor]] = {}
        for key, tensors in sequences.items():
            rows = len(tensors["logps"])
            places.append((key, first, rows))
            first += rows
            for name, values in tensors.items():
                columns.setdefault(name, []).append(values)
        file = self._file(number)
        with whole_file(file) as unfinished:
            save_file({name: torch.cat(parts).contiguous() for name, parts in columns.items()}, unfinished)
        listing = {"sha256": sha256(file), "rows": first, "sequences": places}
        write_json(file.with_suffix(".json"), listing | {"check": digest(listing)})
        self._places |= {key: (number, start, rows) for key, start, rows in places}
        self._next = number + 1


def _number(file: Path) -> int:
    """The number in the name of a shard, or of its list."""
    digits = file.name.partition("-")[2].partition(".")[0]
    if not digits.isdecimal():
        raise DpkdError(f"{file} is no shard of this store: expected a name such as shard-00000.json. Move it away.")
    return int(digits)


def _sequences(file: Path) -> list[tuple[str, int, int]]:
    """What a shard holds, once it is known to be the shard that was written.

    Raises DpkdError, naming the file, when the list or the shard is damaged or absent.
    """
    shard = file.with_suffix(".safetensors")
    advice = f"Delete {file.name} and {shard.name} and run `dpkd cache` again: it computes what is missing."
    listing = read_json(file, advice)
    try:
        sequences = [(str(key), int(first), int(rows)) for key, first, rows in listing["sequences"]]
        expected, check = listing["sha256"], listing.pop("check")
        if check != digest(listing):
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise DpkdError(f"{file} is damaged, or was written by an older version of dpkd. {advice}") from None
    if not shard.is_file():
        raise DpkdError(f"{shard} is lost: {file.name} lists its {len(sequences):,} responses. {advice}")
    with storage_errors(shard, advice):
        if sha256(shard) != expected:
            raise DpkdError(f"{shard} is damaged: its checksum is not the one in {file.name}. {advice}")
    return sequences
