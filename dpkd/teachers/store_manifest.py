"""What a store of teacher log-probs says of itself, and what it can serve."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from dpkd.api import TeacherAccess, TeacherOffer, Text
from dpkd.errors import DpkdError
from dpkd.io import digest, write_json

FORMAT = 1
Kind = Literal["tokens", "topk", "sampled"]


@dataclass(frozen=True)
class Manifest:
    """Everything that decides the numbers in a store.

    kind         tokens: log-prob of each given token; topk: also the k likeliest and the mass of the rest;
                 sampled: also k ids drawn from the teacher at each position (random-sampling KD, 2503.16870)
    model        fingerprint of the teacher's weights
    tokenizer    fingerprint of its tokenizer
    vocabulary   ids that it predicts
    text         who wrote the responses: dataset, teacher, or both
    data         fingerprint of the examples; template: how prompts were written
    dtype        of the stored log-probs
    seed         of the sampled ids
    """

    kind: Kind
    k: int
    model: str
    model_name: str
    tokenizer: str
    vocabulary: int
    text: tuple[str, ...]
    data: str
    template: str
    dtype: str
    seed: int

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one response token."""
        size = {"float16": 2, "float32": 4}[self.dtype]
        return 4 + {"tokens": 0, "topk": self.k * (4 + size), "sampled": self.k * 4}[self.kind]

    @property
    def offer(self) -> TeacherOffer:
        """What a store with this manifest gives."""
        access = {"tokens": TeacherAccess.TOKEN_LOGPS, "topk": TeacherAccess.TOP_K, "sampled": TeacherAccess.SAMPLED}
        return TeacherOffer(
            access[self.kind],
            k=self.k,
            vocabulary=self.vocabulary,
            writers=frozenset(Text(writer) for writer in self.text),
            what="the store",
            has=self.sentence().split(" of ")[0],
            more=_more,
        )

    def sentence(self) -> str:
        """For printing."""
        what = {
            "tokens": "log-probs of the given tokens",
            "topk": f"the {self.k} likeliest tokens and the mass of the rest",
            "sampled": f"{self.k} sampled tokens",
        }[self.kind]
        return f"{what} of {self.model_name}, on responses by {' and '.join(self.text)}"


def _more(what: TeacherAccess | Text, k: int | None = None) -> str:
    """The command that writes a store with more in it."""
    if isinstance(what, Text):
        return "write it with `dpkd cache` and this run's settings"
    if what is TeacherAccess.TOP_K:
        return f"`dpkd cache --kind topk --k {k}` (or more)"
    return "`dpkd cache --kind sampled`" if what is TeacherAccess.SAMPLED else ""


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest of a new store, or check the one that is there.

    Raises DpkdError when the folder holds other numbers.
    """
    file = folder / "manifest.json"
    if file.exists():
        before = read_manifest(folder)
        changed = [name for name, value in asdict(manifest).items() if getattr(before, name) != _plain(value)]
        if changed:
            raise DpkdError(
                f"{folder} holds other numbers: {', '.join(changed)} differ (manifest.json). Choose another --output, "
                "or delete that folder."
            )
        return
    values = {"format": FORMAT, **asdict(manifest)}
    write_json(file, values | {"check": digest(values)})


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def read_manifest(folder: str | Path) -> Manifest:
    """The manifest of a store. Raises DpkdError when the folder is none, or of another version."""
    file = Path(folder) / "manifest.json"
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        check = values.pop("check", None)  # stores of 0.1.0 have none
        if check is not None and check != digest(values):
            raise ValueError("it is damaged: its checksum is wrong; delete it and run `dpkd cache` again")
        if values.pop("format") != FORMAT:
            raise DpkdError(f"{file}: another version of dpkd wrote this store; write it anew with `dpkd cache`")
        return Manifest(**{name: _plain(value) for name, value in values.items()})
    except FileNotFoundError as error:
        raise DpkdError(
            f"teacher.store: {folder} is no store of teacher log-probs (it has no manifest.json); "
            "`dpkd cache --output FOLDER` writes one"
        ) from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DpkdError(f"{file} cannot be read: {error}") from error
