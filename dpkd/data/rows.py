"""Files to raw rows: every format read so that a bad row is known by its file and line (or row number)."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from dpkd.errors import DpkdError
from dpkd.io import regular

BOM = b"\xef\xbb\xbf"
LONGEST_CSV_CELL = 2**31 - 1
LINE_FEED = "\n"


class RawRow(NamedTuple):
    """A row as it stands in the file; the id is `FILE:NUMBER`, counted from 1: the line on which the row begins, or
    the number of the row in a file that is not read by lines."""

    id: str
    value: dict[str, Any]


class BadRow(NamedTuple):
    """A row that cannot be used: where it is, the kind of mistake (for counting), and what was found."""

    where: str
    reason: str
    detail: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}: {self.detail}"


Rows = Iterator[RawRow | BadRow]


def _as_row(where: str, value: Any) -> RawRow | BadRow:
    if isinstance(value, dict):
        return RawRow(where, value)
    return BadRow(where, "not an object", f"expected {{...}}, found {json.dumps(value)[:60]}")


def _decode(where: str, line: bytes) -> str | BadRow:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        return BadRow(where, "not UTF-8", f"byte 0x{line[error.start]:02x} at byte {error.start + 1} of the line")


def _json_row(where: str, line: bytes) -> RawRow | BadRow:
    text = _decode(where, line)
    if isinstance(text, BadRow):
        return text
    try:
        return _as_row(where, json.loads(text.rstrip()))
    except json.JSONDecodeError as error:
        return BadRow(where, "not JSON", f"{error.msg} at column {error.colno}")
    except RecursionError:
        return BadRow(where, "not JSON", "brackets nested too deeply")
    except ValueError as error:  # a number of thousands of digits
        return BadRow(where, "not JSON", str(error))


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Numbered lines that hold something; only a line feed ends a line, U+2028 inside a text does not."""
    with regular(path).open("rb") as file:
        for number, line in enumerate(file, 1):
            content = line.removeprefix(BOM) if number == 1 else line
            if content.strip():
                yield number, content


def _jsonl_rows(path: Path, name: str) -> Rows:
    for number, line in _lines(path):
        yield _json_row(f"{name}:{number}", line)


def _json_list(path: Path) -> list[Any] | None:
    """The rows of a JSON list, or of `{"data": [...]}`; None when the file holds one object a line."""
    content = path.read_bytes().removeprefix(BOM)
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        if not content.lstrip().startswith(b"["):
            return None
        raise DpkdError(f"{path}: not a JSON list: {error}. Expected a list of objects.") from None
    if isinstance(value, dict):
        value = value.get("data")
    return value if isinstance(value, list) else None


def _json_rows(path: Path, name: str) -> Rows:
    values = _json_list(path)
    if values is None:
        yield from _jsonl_rows(path, name)
        return
    for number, value in enumerate(values, 1):
        yield _as_row(f"{name}:{number}", value)


def _csv_rows(path: Path, name: str) -> Rows:
    """Cells stay text, whatever they look like; bytes that are not UTF-8 are found when a cell is used.

    Raises ValueError for a header that names a column twice, and for a quote that is never closed or stands inside a
    cell: which cells were meant is a guess.
    """
    limit = csv.field_size_limit(LONGEST_CSV_CELL)
    try:
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            header = reader.fieldnames or []
            if twice := sorted({repr(column) for column in header if header.count(column) > 1}):
                raise ValueError(f"the header names {', '.join(twice)} more than once")
            for row in _closed(reader):
                cells = [str(cell) for cell in row.values()]
                where = f"{name}:{reader.line_num - sum(cell.count(LINE_FEED) for cell in cells)}"
                if None in row:
                    yield BadRow(where, "too many cells", f"the header has {len(row) - 1} columns")
                else:
                    yield RawRow(where, row)
    finally:
        csv.field_size_limit(limit)


def _closed(reader: csv.DictReader[str]) -> Iterator[dict[str, Any]]:
    """The rows of a strict reader, its errors with the line on which the broken row begins."""
    while True:
        begin = reader.line_num + 1
        try:
            row = next(reader, None)
        except csv.Error as error:
            what = "a quoted cell is never closed" if "unexpected end" in str(error) else f"broken quotes ({error})"
            raise ValueError(f"{what}, in the row that begins on line {begin}") from error
        if row is None:
            return
        yield row


def _parquet_rows(path: Path, name: str) -> Rows:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for value in batch.to_pylist():
                    number += 1
                    yield RawRow(f"{name}:{number}", value)
    except pa.ArrowException as error:
        raise ValueError(error) from error


def text_rows(path: Path, name: str, column: str) -> Rows:
    """Plain text as rows of one column: a document a line, empty lines left out."""
    for number, line in _lines(path):
        where = f"{name}:{number}"
        text = _decode(where, line)
        yield text if isinstance(text, BadRow) else RawRow(where, {column: text.rstrip("\r\n")})


READERS: dict[str, Callable[[Path, str], Rows]] = {
    ".jsonl": _jsonl_rows,
    ".json": _json_rows,
    ".csv": _csv_rows,
    ".parquet": _parquet_rows,
}


def file_rows(path: Path, name: str) -> Rows:
    """Rows of one file, by its suffix; `name` stands in the ids. Raises DpkdError when the file is broken."""
    try:
        yield from READERS[path.suffix.lower()](regular(path), name)
    except (OSError, ValueError, csv.Error) as error:
        raise DpkdError(f"{path}: cannot be read as {path.suffix[1:]}: {error}") from error
