"""Where rows come from: local files, folders of them, or a data set of the hub."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from dpkd.data.hub import local_only
from dpkd.data.memory import refuse_memory
from dpkd.data.rows import READERS, BadRow, RawRow, Rows, file_rows
from dpkd.data.settings import DEFAULT_DATA
from dpkd.data.wording import TRAINING, Wording
from dpkd.errors import DpkdError

SPLIT_NAMES = frozenset({"train", "dev", "valid", "validation", "val", "test", "eval"})
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
Reader = Callable[[Path, str], Rows]


class Place(NamedTuple):
    """What the settings say about where the rows are; `wording` has their names in messages (`data.path`)."""

    path: str
    split: str
    wording: Wording = TRAINING
    subset: str | None = None
    streaming: bool = False

    @property
    def setting(self) -> str:
        """What names the rows."""
        return self.wording.path


class DataFile(NamedTuple):
    """Rows, read lazily, and a description for people."""

    description: str
    rows: Iterator[RawRow | BadRow]


def open_source(place: Place, extra_readers: dict[str, Reader] | None = None) -> DataFile:
    """Find the rows; nothing is read yet, but for the header of a hub data set.

    Raises DpkdError when there is no such file, a folder is ambiguous, or the hub cannot be reached.
    """
    refuse_memory(place.path, place.setting)
    readers: dict[str, Reader] = {**dict.fromkeys(READERS, file_rows), **(extra_readers or {})}
    path = Path(place.path).expanduser()
    if path.is_dir():
        if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            return _saved_source(place, path)
        return _folder_source(place, path, readers)
    if path.exists():
        if path.suffix.lower() not in readers:
            raise DpkdError(
                f"{place.setting}: {place.path} is not a format that dpkd reads; expected "
                f"{_listed(readers)}, or a folder of such files."
            )
        return DataFile(place.path, readers[path.suffix.lower()](path, path.name))
    if path.suffix.lower() in readers or not HUB_ID.fullmatch(place.path):
        raise DpkdError(f"{place.setting}: there is no file {place.path}.{_nearest(path)}")
    return _hub_source(place)


def file_stamp(path: str) -> tuple[Any, ...] | None:
    """What changes when a file is written again; None for what is not one file: a folder, a hub data set."""
    file = Path(path).expanduser()
    if not file.is_file():
        return None
    found = file.stat()
    return str(file), found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def memory_source(rows: Iterable[Any]) -> DataFile:
    """Rows that are in memory already; their ids are `row:NUMBER`, counted from 1."""
    return DataFile("rows in memory", (_as_row(f"row:{number}", value) for number, value in enumerate(rows, 1)))


def _as_row(where: str, value: Any) -> RawRow | BadRow:
    if isinstance(value, Mapping):
        return RawRow(where, dict(value))
    return BadRow(where, "not a mapping", f"expected {{column: value}}, found {repr(value)[:60]}")


def _listed(names: Any) -> str:
    *most, last = names
    return f"{', '.join(most)} or {last}"


def _nearest(path: Path) -> str:
    """A sentence with the first part of the path that is not there, and the existing name nearest to it."""
    missing = path
    while not missing.parent.exists():
        missing = missing.parent
    names = [entry.name for entry in missing.parent.iterdir()] if missing.parent.is_dir() else []
    # Without the endings: what two names share of `.jsonl` does not make them near.
    stems = difflib.get_close_matches(missing.stem, list({Path(name).stem for name in names}), n=3, cutoff=0.6)
    near = [name for name in names if Path(name).stem in stems]
    if close := difflib.get_close_matches(missing.name, near, n=1, cutoff=0.0):
        return f" Did you mean {missing.parent / close[0]}?"
    return f" There is no folder {missing} either." if missing != path else ""


def _folder_source(place: Place, folder: Path, readers: dict[str, Reader]) -> DataFile:
    files = _choose_files(place, folder, readers)
    parts = (readers[file.suffix.lower()](file, file.relative_to(folder).as_posix()) for file in files)
    count = "1 file" if len(files) == 1 else f"{len(files)} files"
    return DataFile(f"{place.path} ({count})", (row for part in parts for row in part))


def _choose_files(place: Place, folder: Path, readers: dict[str, Reader]) -> list[Path]:
    """The files of the split where files are named after splits, else all: no test file by accident."""
    files = [f for f in sorted(folder.rglob("*")) if f.is_file() and f.suffix.lower() in readers]
    files = [f for f in files if not any(part.startswith(".") for part in f.relative_to(folder).parts)]
    if not files:
        raise DpkdError(f"{place.setting}: the folder {place.path} holds no {_listed(readers)} file.")
    chosen = [f for f in files if place.split in _words(f, folder)]
    if chosen:
        return chosen
    others = [f.relative_to(folder).as_posix() for f in files if _words(f, folder) & SPLIT_NAMES]
    if others:
        raise DpkdError(
            f"{place.setting}: the folder {place.path} holds {', '.join(others[:5])} but nothing named "
            f"{place.split!r}. Name one file, or the split: {place.wording.other_split}"
        )
    return files


def _words(file: Path, folder: Path) -> set[str]:
    """`train-00000-of-00002.parquet` and `train/part.jsonl` both belong to `train`."""
    return {re.split(r"[-_.]", part)[0].lower() for part in file.relative_to(folder).parts}


def _saved_source(place: Place, path: Path) -> DataFile:
    """A folder written by `datasets`' save_to_disk."""
    import datasets

    saved = datasets.load_from_disk(str(path))
    if isinstance(saved, datasets.DatasetDict):
        if place.split not in saved:
            raise DpkdError(
                f"{place.setting}: {place.path} has no split {place.split!r}; it has {', '.join(map(str, saved))}."
            )
        saved = saved[place.split]
    return DataFile(place.path, _numbered(place, saved))


def _hub_source(place: Place) -> DataFile:
    import datasets

    load = partial(datasets.load_dataset, place.path, place.subset, split=place.split, streaming=place.streaming)
    try:
        with local_only():
            dataset = load()
    except Exception as error:  # the library has no common base: network, name, subset, split, format
        raise _unavailable(place, error) from error
    return DataFile(f"hub data set {place.path}, split {place.split}", _numbered(place, dataset))


def _numbered(place: Place, dataset: Any) -> Rows:
    name = f"{place.path.rstrip('/').split('/')[-1]}/{place.split}"
    try:
        for number, row in enumerate(dataset, 1):
            yield RawRow(f"{name}:{number}", dict(row))
    except Exception as error:
        raise _unavailable(place, error) from error


def _unavailable(place: Place, error: Exception) -> DpkdError:
    what = f"the default data set {place.path}" if place.path == DEFAULT_DATA else f"the data set {place.path}"
    reason = str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__
    own_file = place.wording.own_file
    advice = (
        f"Without the hub, pass your own file: {own_file} (`dpkd demo` needs no data)."
        if isinstance(error, OSError)
        else f"Check the id, split and subset, or pass your own file: {own_file}"
    )
    return DpkdError(
        f"{place.setting}: {what} is not a local file, and loading it from the hub failed: {reason}. {advice}"
    )
