"""The store of teacher responses: written once, reused by every later run that would draw the same.

One folder per key: model, tokenizer (template and special tokens included), sampling settings and seed.

    FOLDER/KEY/manifest.json     what the key consists of, in clear
    FOLDER/KEY/responses.jsonl   one response a line, in the order of writing

Lines are only ever appended, each under a lock and with a checksum, so runs may share a store. A torn last line is cut
off; a line that is damaged is left out, and its response is drawn again.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpkd.api import SamplingSettings
from dpkd.errors import DpkdError
from dpkd.io import (
    APPEND,
    append_to,
    cache_folder,
    cut_torn_line,
    digest,
    dumps,
    parsed,
    read_json,
    remove_leftovers,
    storage_errors,
    write_json,
)

try:
    import fcntl
except ImportError:  # no advisory locks on Windows: runs must not share a store there
    fcntl = None  # type: ignore[assignment]

VERSION = 1
_ADVICE = "Free some space, or choose another folder for the teacher's responses with text.store."


@dataclass(frozen=True)
class Stored:
    """A response of the store: token ids (EOS included when it was drawn), and the text for people."""

    response_ids: tuple[int, ...]
    truncated: bool
    text: str


def default_folder() -> Path:
    """`responses` in the user's cache."""
    return cache_folder() / "responses"


class ResponseStore:
    """Responses of one model under one way of sampling, by prompt. Make it with `open`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file = folder / "responses.jsonl"
        self._known: dict[str, Stored] = {}
        self._read_to = 0  # bytes of the file that were read: whole lines

    @classmethod
    def open(
        cls,
        folder: Path | None,
        *,
        model_fingerprint: str,
        tokenizer_fingerprint: str,
        sampling: SamplingSettings,
        seed: int,
        backend: Mapping[str, Any] | None = None,
    ) -> ResponseStore:
        """The store of a key in `folder` (None: the user's cache); it is created when it is new.

        The key is all that decides a response but for the prompt; `batch_size` decides nothing. `backend` says what
        draws, with its settings; None is dpkd's own sampler.

        Raises DpkdError when the folder cannot be used, or was written by another version of dpkd.
        """
        key = {
            "model": model_fingerprint,
            "tokenizer": tokenizer_fingerprint,
            "sampling": sampling.model_dump(mode="json", exclude={"batch_size"}),
            "seed": seed,
            **({"backend": dict(backend)} if backend is not None else {}),
        }
        store = cls((default_folder() if folder is None else Path(folder)) / digest(key))
        with storage_errors(store.folder, _ADVICE):
            store.folder.mkdir(parents=True, exist_ok=True)
            with _locked(store._file):
                remove_leftovers(store.folder)
                _check_manifest(store.folder / "manifest.json", key)
        store.refresh()
        return store

    def __len__(self) -> int:
        """How many responses are known."""
        return len(self._known)

    def get(self, prompt_ids: Sequence[int]) -> Stored | None:
        """The response to a prompt, or None when it was not written yet."""
        return self._known.get(_prompt_key(prompt_ids))

    def add(self, prompt_ids: Sequence[int], response_ids: Sequence[int], truncated: bool, text: str) -> None:
        """Append the response to a prompt, unless it has one, perhaps by another run; it is then in the file."""
        key = _prompt_key(prompt_ids)
        with storage_errors(self.folder, _ADVICE), _locked(self._file) as descriptor:
            self._read(descriptor)
            if key in self._known:
                return
            ids = [int(token) for token in response_ids]
            line = {"prompt": key, "index": 0, "ids": ids, "truncated": bool(truncated), "text": text}
            content = f"{dumps(line | {'check': _check(line)})}\n"
            append_to(descriptor, content.encode("utf-8", errors="backslashreplace"))
            self._read(descriptor)

    def refresh(self) -> None:
        """Read what other processes have added."""
        with storage_errors(self.folder, _ADVICE), _locked(self._file) as descriptor:
            self._read(descriptor)

    def _read(self, descriptor: int) -> None:
        """Read the lines behind those that were read. Under the lock nobody is writing: a tail is torn."""
        cut_torn_line(descriptor)
        blocks, place = [], self._read_to
        while block := os.pread(descriptor, 1 << 20, place):
            blocks.append(block)
            place += len(block)
        *lines, _ = b"".join(blocks).split(b"\n")
        self._read_to = place
        for line in filter(None, lines):
            row = parsed(line)
            stored = _stored(row)
            if row is not None and stored is not None:
                self._known.setdefault(str(row["prompt"]), stored)


def _check(row: Mapping[str, Any]) -> str:
    return digest(row)[:16]


def _stored(row: dict[str, Any] | None) -> Stored | None:
    """The response in a line; None when the line is damaged. Older lines have no checksum."""
    try:
        if row is None or (row.pop("check", None) or _check(row)) != _check(row):
            return None
        return Stored(tuple(map(int, row["ids"])), bool(row["truncated"]), str(row["text"]))
    except (ValueError, KeyError, TypeError):
        return None


def _prompt_key(prompt_ids: Sequence[int]) -> str:
    return digest([int(token) for token in prompt_ids])


def _check_manifest(file: Path, key: dict[str, Any]) -> None:
    """Write the manifest of a new store, or check the one that is there."""
    wanted = {"format": "dpkd responses", "version": VERSION, **key}
    if not file.exists():
        write_json(file, wanted)
        return
    found = read_json(file, f"Move the folder {file.parent} away to have the responses drawn again.")
    if found == wanted:
        return
    version = found.get("version")
    what = "is not one of dpkd's or was edited" if version in (None, VERSION) else f"has version {version}"
    raise DpkdError(
        f"{file} {what}, expected version {VERSION} with the key of this run. Move the folder {file.parent} "
        "away to have the responses written anew, or choose another folder with text.store."
    )


@contextmanager
def _locked(file: Path) -> Iterator[int]:
    """A file opened for appending and reading, for this process alone."""
    descriptor = os.open(file, os.O_RDWR | APPEND, 0o666)
    try:
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)  # releases the lock
