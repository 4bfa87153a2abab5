"""Rows of a file of predictions or references, each with the place it came from."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dpkd.errors import DpkdError
from dpkd.io import regular

_JSON = {".json", ".jsonl", ".ndjson"}
_OTHER_FORMATS = {".csv", ".tsv", ".parquet", ".arrow", ".xlsx", ".gz", ".zip", ".zst"}


def read_rows(path: Path) -> list[tuple[str, Any]]:
    """`(place, row)` of each row: a JSON value, or a text for each line of a plain-text file.

    `.jsonl`, `.ndjson` and `.json` (which may also hold one array) are JSON; `.txt` is plain text, where an
    empty line is an empty text; any other name is JSON lines when its first line is a JSON object, and plain
    text otherwise.
    Lines end at a line feed only: other separators (U+2028, form feed) occur inside of answers.

    Raises DpkdError, with file and line, when the file cannot be read so, or has no row.
    """
    if path.suffix.lower() in _OTHER_FORMATS:
        raise DpkdError(f"{path}: expected JSON lines (.jsonl) or plain text with one text a line (.txt)")
    text = _decoded(path)
    as_json = path.suffix.lower() in _JSON or (path.suffix.lower() != ".txt" and _starts_with_object(text))
    rows = list(_json_rows(path, text) if as_json else _lines(path, text))
    if not rows:
        raise DpkdError(f"{path}: expected at least one row, found an empty file")
    return rows


def _decoded(path: Path) -> str:
    try:
        raw = regular(path).read_bytes()
    except OSError as error:
        raise DpkdError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DpkdError(f"{path}:{line}: expected UTF-8, found the byte 0x{raw[error.start]:02x}") from error


def _starts_with_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text.lstrip().split("\n", 1)[0]), dict)
    except (ValueError, RecursionError):
        return False


def _lines(path: Path, text: str) -> Iterator[tuple[str, str]]:
    lines = text.split("\n")
    if lines[-1] == "":
        lines.pop()
    for number, line in enumerate(lines, start=1):
        yield f"{path}:{number}", line.removesuffix("\r")


def _json_rows(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    if path.suffix.lower() == ".json" and text.lstrip().startswith("["):
        yield from _array_rows(path, text)
        return
    for place, line in _lines(path, text):
        if not line.strip():
            continue
        try:
            yield place, json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DpkdError(f"{place}: expected one JSON value on this line, but {_reason(error)}") from error


def _array_rows(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        line = getattr(error, "lineno", 1)
        raise DpkdError(f"{path}:{line}: expected an array of rows in JSON, but {_reason(error)}") from error
    for number, row in enumerate(rows, start=1):
        yield f"{path}, row {number}", row


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "brackets are nested too deeply"
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg[:1].lower()}{error.msg[1:]} at column {error.colno}"
    return str(error)
