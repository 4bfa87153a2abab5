"""Tokenizers of both kinds, and a way to write data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizer_kinds import REAL, SHARED, byte_tokenizer, piece_tokenizer, real_tokenizer


@pytest.fixture(scope="session", params=["bytes", "pieces", *REAL])
def any_tokenizer(request):
    if request.param in REAL:
        return real_tokenizer(request.param)
    return byte_tokenizer() if request.param == "bytes" else piece_tokenizer()


@pytest.fixture
def byte_level():
    return byte_tokenizer()


@pytest.fixture
def pieces():
    return piece_tokenizer()


@pytest.fixture
def shared() -> Path:
    if not (SHARED / "data").exists():
        pytest.skip(f"{SHARED} is not here (DPKD_SHARED)")
    return SHARED / "data"


@pytest.fixture
def jsonl(tmp_path):
    """Writes rows (or raw bytes, a line each) to a file and returns its path."""

    def write(*rows, name: str = "data.jsonl") -> str:
        lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"\n".join(lines) + b"\n")
        return str(path)

    return write
