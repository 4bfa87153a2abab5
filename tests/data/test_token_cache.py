"""Token ids on disk: the same as those that are encoded, found again only for the same rows and tokenizer."""

from __future__ import annotations

from copy import deepcopy

import pytest

from dpkd.data import token_cache
from dpkd.data.encode import tokenize
from dpkd.data.formats import Example
from dpkd.data.settings import DataSettings
from dpkd.io import StorageError, cache_folder

SETTINGS = DataSettings(path="rows.jsonl", template="alpaca", max_prompt_tokens=160, max_tokens=166)
ROWS = [
    Example(f"rows:{i}", instruction=f"Count to {i}", references=(" ".join(map(str, range(i))) or "no",))
    for i in range(12)
]


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DPKD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(token_cache, "FEWEST", 10)


@pytest.fixture
def encodings(monkeypatch):
    """How often rows were encoded."""
    from dpkd.data import encode

    counted, prompts = [], encode._encode_prompts
    monkeypatch.setattr(encode, "_encode_prompts", lambda *given: counted.append(1) or prompts(*given))
    return counted


def folders():
    return sorted((cache_folder() / "tokens").glob("*"))


def test_the_second_call_reads_what_the_first_encoded(byte_level, encodings):
    first, second = (tokenize(ROWS, byte_level, SETTINGS) for _ in range(2))
    assert first == second
    assert len(encodings) == 1
    assert first.report.cut > 0
    # Limits are no part of the key: they cut what was encoded whole.
    longer = tokenize(ROWS, byte_level, SETTINGS.model_copy(update={"max_tokens": 1024}))
    assert longer.report.cut == 0
    assert len(encodings) == 1


def test_few_rows_leave_nothing_behind(byte_level):
    tokenize(ROWS[:9], byte_level, SETTINGS)
    assert not cache_folder().exists()


@pytest.mark.parametrize("what", ["row", "template", "chat template", "special token"])
def test_what_decides_the_ids_decides_where_they_are_found(what, byte_level, encodings):
    tokenize(ROWS, byte_level, SETTINGS)
    other, rows, settings = deepcopy(byte_level), ROWS, SETTINGS
    if what == "row":
        rows = [*ROWS[:-1], Example("rows:11", instruction="Count", references=("no more",))]
    elif what == "template":
        settings = SETTINGS.model_copy(update={"template": "none"})
    elif what == "chat template":
        other.chat_template = "{{ messages }}"
    else:
        other.add_special_tokens({"additional_special_tokens": ["Count"]})
    found = tokenize(rows, other, settings)
    assert len(encodings) == 2
    assert len(folders()) == 2
    assert found == tokenize(rows, other, settings)


@pytest.mark.parametrize("damage", ["flip", "cut", "lose", "sum", "empty"])
def test_damaged_ids_are_encoded_again(damage, byte_level, encodings):
    whole = tokenize(ROWS, byte_level, SETTINGS)
    (folder,) = folders()
    file = folder / ("sum.json" if damage == "sum" else "ids.feather")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes({"cut": content[:40], "empty": b""}.get(damage, content))
    if damage == "lose":
        file.unlink()
    assert tokenize(ROWS, byte_level, SETTINGS) == whole
    assert len(encodings) == 2
    assert tokenize(ROWS, byte_level, SETTINGS) == whole
    assert len(encodings) == 2


def test_the_latest_data_sets_are_kept(byte_level, monkeypatch):
    monkeypatch.setattr(token_cache, "MOST", 2)
    for last in range(3):
        tokenize([*ROWS, Example("rows:x", instruction=f"Say {last}", references=("x",))], byte_level, SETTINGS)
    assert len(folders()) == 2


def test_a_full_disk_is_no_mistake(byte_level, monkeypatch):
    def full(_folder):
        raise StorageError("no space left on device")

    monkeypatch.setattr(token_cache, "whole_folder", full)
    assert tokenize(ROWS, byte_level, SETTINGS).report.kept == len(ROWS)
