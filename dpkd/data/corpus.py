"""Plain text for the pre-training term: documents joined with EOS and cut into blocks of one length."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

from dpkd.data.encoding import encode, require_eos
from dpkd.data.formats import check_text
from dpkd.data.rows import BadRow, RawRow, text_rows
from dpkd.data.settings import CorpusSettings
from dpkd.data.sources import DataFile, Place, open_source
from dpkd.data.wording import Wording
from dpkd.errors import DpkdError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SETTING = "terms.pretrain.corpus"
DOCUMENTS_AT_ONCE = 1000
MOST_BAD_ROWS_SHOWN = 20


class Corpus(Sequence[tuple[int, ...]]):
    """Blocks of exactly `max_tokens` ids, held at four bytes an id.

    `documents` counts what was read, `left_over` the ids after the last block; `fingerprint` hashes the ids.
    """

    def __init__(self, ids: array[int], max_tokens: int, *, documents: int, source: str) -> None:
        self._ids, self._size = ids, max_tokens
        self.documents, self.source = documents, source
        self.left_over = len(ids) % max_tokens
        self.fingerprint = hashlib.sha256(ids.tobytes() + f"/{max_tokens}".encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._ids) // self._size

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        start = range(len(self))[index] * self._size
        return tuple(self._ids[start : start + self._size])

    def facts(self) -> dict[str, Any]:
        """What run.json says of it."""
        return {
            "path": self.source,
            "fingerprint": self.fingerprint,
            "documents": self.documents,
            "blocks": len(self),
            "left_over_tokens": self.left_over,
        }

    def sentence(self) -> str:
        """For printing."""
        return f"{self.source}: {self.documents:,} documents, {len(self):,} blocks of {self._size:,} tokens"


def check_corpus(settings: CorpusSettings) -> None:
    """Read the first documents of a corpus. Raises DpkdError when it cannot be found or understood."""
    first = min(settings.limit or DOCUMENTS_AT_ONCE, DOCUMENTS_AT_ONCE)
    for _ in _documents(islice(_rows(settings).rows, first), settings):
        pass


def _rows(settings: CorpusSettings) -> DataFile:
    wording = Wording(f"{SETTING}.path", f"--set {SETTING}.path=FILE.txt", split=f"--set {SETTING}.split=NAME")
    place = Place(settings.path, settings.split, wording)
    return open_source(place, {".txt": partial(text_rows, column=settings.column)})


def read_corpus(settings: CorpusSettings, tokenizer: PreTrainedTokenizerBase) -> Corpus:
    """Read, encode and cut a corpus; blocks start anywhere in a document, and no BOS is added.

    Raises DpkdError for text that cannot be found or read, and when it does not fill one block.
    """
    eos_id = require_eos(tokenizer)
    source = _rows(settings)
    documents = _documents(islice(source.rows, settings.limit), settings)
    ids: array[int] = array("i")
    count = 0
    while texts := list(islice(documents, DOCUMENTS_AT_ONCE)):
        count += len(texts)
        for encoded in encode(tokenizer, texts):
            ids.extend(encoded)
            ids.append(eos_id)
    if len(ids) < settings.max_tokens:
        raise DpkdError(
            f"{SETTING}.path: {settings.path} has {len(ids):,} tokens in {count:,} documents, less than one "
            f"block of {settings.max_tokens:,}. Use more text, or lower {SETTING}.max_tokens."
        )
    return Corpus(ids, settings.max_tokens, documents=count, source=source.description)


def _documents(rows: Iterable[RawRow | BadRow], settings: CorpusSettings) -> Iterator[str]:
    """Texts that hold something. Raises DpkdError with the first bad rows, all at once."""
    bad: list[BadRow] = []
    for row in rows:
        text = check_text(row, settings.column) if isinstance(row, RawRow) else row
        if isinstance(text, BadRow):
            bad.append(text)
            if len(bad) == MOST_BAD_ROWS_SHOWN:
                break
        elif text.strip() and not bad:
            yield text
    if bad:
        listed = "\n".join(f"  {row}" for row in bad)
        raise DpkdError(
            f"{SETTING}.path: rows of {settings.path} cannot be read (column `{settings.column}`; set "
            f"{SETTING}.column for another):\n{listed}"
        )
