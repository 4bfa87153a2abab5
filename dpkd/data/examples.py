"""Instruction data: rows of a file or of the hub as examples; bad rows reported at once, by file and line."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

from dpkd.data.formats import Example, RowFormat, find_shape, not_understood, to_example
from dpkd.data.rows import BadRow, RawRow
from dpkd.data.settings import DataSettings
from dpkd.data.sources import Place, memory_source, open_source
from dpkd.errors import DpkdError

MOST_BAD_ROWS_SHOWN = 20


@dataclass(frozen=True)
class ExampleSet:
    """Examples in the order of their file, the rows left out, a hash of the examples, and their origin."""

    examples: tuple[Example, ...]
    skipped: tuple[BadRow, ...]
    fingerprint: str
    source: str

    def skipped_by_reason(self) -> dict[str, int]:
        """How many rows were left out, for each kind of mistake."""
        return dict(Counter(bad.reason for bad in self.skipped))

    def lines(self) -> list[str]:
        """For printing: what was read, and every kind of bad row with the first place where it stands."""
        first = {bad.reason: bad.where for bad in reversed(self.skipped)}
        counts = self.skipped_by_reason().items()
        return [
            f"{self.source}: {len(self.examples):,} examples",
            *(f"skipped {count:,}: {reason} (first: {first[reason]})" for reason, count in counts),
        ]


def read_examples(
    settings: DataSettings, *, require_response: bool = True, rows: Iterable[Any] | None = None
) -> ExampleSet:
    """All examples of a data set, at most `limit` rows of it; `rows` are those of the data set, if in memory.

    Without `require_response`, rows that hold a prompt alone are good too. Raises DpkdError for data that
    cannot be found, columns that are not understood, bad rows (unless skipped), and when nothing is left.
    """
    place = Place(settings.path, settings.split, "data.path", settings.subset, settings.streaming)
    source = open_source(place) if rows is None else memory_source(rows)
    reader = _Reader(settings, require_response)
    reader.read(islice(source.rows, settings.limit))
    examples, bad = tuple(reader.examples), tuple(reader.bad)
    if bad and settings.on_bad_row == "error":
        raise _bad_rows(source.description, bad)
    found = ExampleSet(examples, bad, fingerprint(examples), source.description)
    if not examples:
        raise DpkdError("\n".join([f"data.path: no row of {settings.path} can be used.", *found.lines()[1:]]))
    return found


def fingerprint(examples: Iterable[Example]) -> str:
    """A hash of ids and content in order: the same on every machine, and for no other data."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps(asdict(example), sort_keys=True).encode())
        digest.update(b"\n")
    return digest.hexdigest()


class _Reader:
    """Collects examples and bad rows; the shape is the one of the first row that has one."""

    def __init__(self, settings: DataSettings, require_response: bool) -> None:
        self._settings, self._require_response = settings, require_response
        self._shape: RowFormat | None = None
        self._input_seen = settings.columns.input is None or settings.limit is not None
        self.examples: list[Example] = []
        self.bad: list[BadRow] = []

    def read(self, rows: Iterable[RawRow | BadRow]) -> None:
        stops = self._settings.on_bad_row == "error"
        unshaped: RawRow | None = None
        for row in rows:
            result = self._example(row)
            if isinstance(result, Example):
                self.examples.append(result)
            else:
                self.bad.append(result)
                if self._shape is None and isinstance(row, RawRow):
                    unshaped = unshaped or row
                if stops and len(self.bad) == MOST_BAD_ROWS_SHOWN:
                    break
        if self._shape is None and unshaped:
            raise not_understood(unshaped, self._settings.columns, require_response=self._require_response)
        if self.examples and not self._input_seen:
            name = self._settings.columns.input
            raise DpkdError(f"data.columns.input: no row of {self._settings.path} has a column {name!r}.")

    def _example(self, row: RawRow | BadRow) -> Example | BadRow:
        if isinstance(row, BadRow):
            return row
        columns, required = self._settings.columns, self._require_response
        if self._shape is None:
            self._shape = find_shape(row, columns, require_response=required)
            if self._shape is None:
                return BadRow(row.id, "missing field", f"only {', '.join(map(str, row.value)) or 'nothing'} given")
        self._input_seen = self._input_seen or columns.input in row.value
        return to_example(row, self._shape, require_response=required)


def _bad_rows(source: str, bad: tuple[BadRow, ...]) -> DpkdError:
    count = f"{len(bad)} row{'s' if len(bad) > 1 else ''}"
    if len(bad) >= MOST_BAD_ROWS_SHOWN:
        count = f"at least {len(bad)} rows"
    return DpkdError(
        "\n".join(
            [
                f"data.path: {count} of {source} cannot be read:",
                *(f"  {row}" for row in bad),
                "Mend them, or leave bad rows out and count them: --set data.on_bad_row=skip",
            ]
        )
    )
