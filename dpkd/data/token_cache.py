"""Token ids of a data set on disk, by all that they were made from: a later process reads them instead of encoding."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dpkd.io import StorageError, cache_folder, parsed, sha256, whole_folder, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FEWEST = 2_000  # rows below which encoding is as quick as reading
MOST = 20  # data sets that are kept: the latest


class RowIds(NamedTuple):
    """Ids of each row: its prompt, its response and the rejected response, empty where there is none."""

    prompts: list[tuple[int, ...]]
    responses: list[tuple[int, ...]]
    rejected: list[tuple[int, ...]]


def remembered_ids(
    rows: Sequence[Sequence[str | None]], tokenizer: PreTrainedTokenizerBase, make: Callable[[], RowIds]
) -> RowIds:
    """What `make` returns, or returned in an earlier process for the same rows and tokenizer.

    rows       all that decides the ids of a row beside the tokenizer
    tokenizer  few rows, and tokenizers that cannot be written down whole, are encoded every time
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if len(rows) < FEWEST or backend is None:
        return make()
    folder = cache_folder() / "tokens" / _key(rows, tokenizer, backend.to_str())
    found = _read(folder, len(rows))
    if found is None:
        found = make()
        _write(folder, found)
    return found


def _key(rows: Iterable[Sequence[str | None]], tokenizer: PreTrainedTokenizerBase, backend: str) -> str:
    """A hash of the rows, the tokenizer with its special tokens and chat template, and the code that encodes."""
    made_by = {name: version(name) for name in ("dpkd", "tokenizers", "transformers")}
    told = [made_by, backend, sorted(map(str, tokenizer.special_tokens_map.items())), tokenizer.chat_template]
    found = hashlib.sha256(json.dumps(told, default=str).encode())
    for row in rows:
        found.update(json.dumps(row).encode())
    return found.hexdigest()[:32]


def _read(folder: Path, rows: int) -> RowIds | None:
    """The ids in a folder; None where there are none, or others than were written."""
    import pyarrow as pa
    from pyarrow import feather

    file = folder / "ids.feather"
    try:
        known = parsed((folder / "sum.json").read_bytes()) or {}
        if known.get("sha256") != sha256(file):
            return None
        table = feather.read_table(file, memory_map=False)
        found = RowIds(*([tuple(ids) for ids in table.column(name).to_pylist()] for name in RowIds._fields))
    except (OSError, ValueError, KeyError, pa.ArrowException):
        return None
    return found if {len(column) for column in found} == {rows} else None


def _write(folder: Path, ids: RowIds) -> None:
    """Keep ids, and forget those of the oldest data sets; a disk that has no room for them is no mistake."""
    import pyarrow as pa
    from pyarrow import feather

    kind = pa.list_(pa.int32())
    columns: dict[str, Any] = {name: pa.array(column, kind) for name, column in ids._asdict().items()}
    try:
        with whole_folder(folder) as unfinished:
            feather.write_feather(pa.table(columns), unfinished / "ids.feather", compression="zstd")
            write_json(unfinished / "sum.json", {"sha256": sha256(unfinished / "ids.feather")})
    except (StorageError, OSError):
        return
    kept = sorted((p for p in folder.parent.iterdir() if p.is_dir()), key=lambda p: p.stat().st_mtime, reverse=True)
    for old in kept[MOST:]:
        shutil.rmtree(old, ignore_errors=True)
