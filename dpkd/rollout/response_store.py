"""The store of teacher responses: written once, reused by every later run that would draw the same.

One folder per key: model, tokenizer (template and special tokens included), sampling settings and seed.

    FOLDER/KEY/manifest.json     what the key consists of, in clear
    FOLDER/KEY/responses.jsonl   one response a line, in the order of writing

Lines are only ever appended, each under a lock, so runs may share a store. A line that was torn by a crash is
dropped and counted.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpkd.errors import DpkdError
from dpkd.models.fingerprint import digest
from dpkd.rollout.base import SamplingSettings

try:
    import fcntl
except ImportError:  # no advisory locks on Windows: runs must not share a store there
    fcntl = None  # type: ignore[assignment]

VERSION = 1


@dataclass(frozen=True)
class Stored:
    """A response of the store: token ids (EOS included when it was drawn), and the text for people."""

    response_ids: tuple[int, ...]
    truncated: bool
    text: str


def default_folder() -> Path:
    """`$DPKD_CACHE`, else `$XDG_CACHE_HOME/dpkd`, else `~/.cache/dpkd`; in it `responses`."""
    if cache := os.environ.get("DPKD_CACHE"):
        return Path(cache).expanduser() / "responses"
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "dpkd" / "responses"


class ResponseStore:
    """Responses of one model under one way of sampling, by prompt. Make it with `open`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file = folder / "responses.jsonl"
        self._known: dict[str, dict[int, Stored]] = {}
        self._read_to = 0  # bytes of the file that were read: whole lines
        self._broken_lines = 0
        self._torn_tail = False

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
        with _errors_of(store.folder):
            store.folder.mkdir(parents=True, exist_ok=True)
            _check_manifest(store.folder / "manifest.json", key)
        store.refresh()
        return store

    @property
    def torn_lines(self) -> int:
        """Lines that could not be read: a writer was interrupted."""
        return self._broken_lines + self._torn_tail

    def __len__(self) -> int:
        """How many responses are known."""
        return sum(map(len, self._known.values()))

    def get(self, prompt_ids: Sequence[int], index: int = 0) -> Stored | None:
        """The response number `index` to a prompt, or None when it was not written yet."""
        return self._known.get(_prompt_key(prompt_ids), {}).get(index)

    def add(
        self,
        prompt_ids: Sequence[int],
        response_ids: Sequence[int],
        truncated: bool,
        text: str,
        index: int | None = None,
    ) -> None:
        """Append a response to a prompt; it is in the file when this returns.

        `index` None: the next number. A number that is taken, perhaps by another run, keeps what it has.
        """
        key = _prompt_key(prompt_ids)
        with _errors_of(self.folder), _locked(self._file) as descriptor:
            self._read(descriptor)
            known = self._known.get(key, {})
            number = max(known, default=-1) + 1 if index is None else index
            if number in known:
                return
            line = {"prompt": key, "index": number, "ids": [int(token) for token in response_ids]}
            line |= {"truncated": bool(truncated), "text": text}
            written = json.dumps(line).encode() + b"\n"
            if self._torn_tail:
                written = b"\n" + written  # what is torn stays a line of its own
            while written:
                written = written[os.write(descriptor, written) :]
            self._read(descriptor)

    def refresh(self) -> None:
        """Read what other processes have added."""
        with _errors_of(self.folder), _locked(self._file) as descriptor:
            self._read(descriptor)

    def _read(self, descriptor: int) -> None:
        """Read the lines behind those that were read. Under the lock nobody is writing: a tail is torn."""
        blocks, place = [], self._read_to
        while block := os.pread(descriptor, 1 << 20, place):
            blocks.append(block)
            place += len(block)
        *lines, tail = b"".join(blocks).split(b"\n")
        self._read_to = place - len(tail)
        self._torn_tail = bool(tail)
        for line in filter(None, lines):
            try:
                values = json.loads(line)
                stored = Stored(tuple(map(int, values["ids"])), bool(values["truncated"]), str(values["text"]))
                self._known.setdefault(str(values["prompt"]), {}).setdefault(int(values["index"]), stored)
            except (ValueError, KeyError, TypeError):
                self._broken_lines += 1


def _prompt_key(prompt_ids: Sequence[int]) -> str:
    return digest([int(token) for token in prompt_ids])


def _check_manifest(file: Path, key: dict[str, Any]) -> None:
    """Write the manifest of a new store, or check the one that is there."""
    wanted = {"format": "dpkd responses", "version": VERSION, **key}
    if not file.exists():
        # Renamed into place whole: another process may create the same store at the same time.
        with tempfile.NamedTemporaryFile(
            "w", dir=file.parent, prefix=".manifest-", encoding="utf-8", delete=False
        ) as new:
            json.dump(wanted, new, indent=2)
        os.replace(new.name, file)
        return
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if found == wanted:
        return
    version = found.get("version") if isinstance(found, dict) else None
    what = "is not one of dpkd's or was edited" if version in (None, VERSION) else f"has version {version}"
    raise DpkdError(
        f"{file} {what}, expected version {VERSION} with the key of this run. Move the folder {file.parent} "
        "away to have the responses written anew, or choose another folder with text.store."
    )


@contextmanager
def _locked(file: Path) -> Iterator[int]:
    """A file opened for appending and reading, for this process alone."""
    descriptor = os.open(file, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)  # releases the lock


@contextmanager
def _errors_of(folder: Path) -> Iterator[None]:
    """What the file system refuses, as a sentence."""
    try:
        yield
    except OSError as error:
        raise DpkdError(
            f"the store of teacher responses in {folder} cannot be used: {error.strerror or error}. "
            "Choose another folder with text.store."
        ) from error
