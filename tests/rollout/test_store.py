"""The store of teacher responses: keys, crashes, and processes that share it."""

from __future__ import annotations

import json
import multiprocessing
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dpkd.api import SamplingSettings
from dpkd.errors import DpkdError
from dpkd.models.fingerprint import model_fingerprint
from dpkd.rollout.response_store import ResponseStore, Stored, default_folder


def opened(folder: Path, **changes: Any) -> ResponseStore:
    key = {"model_fingerprint": "m", "tokenizer_fingerprint": "t", "sampling": SamplingSettings(), "seed": 1}
    return ResponseStore.open(folder, **{**key, **changes})


def test_reuse_after_reopen(tmp_path: Path) -> None:
    store = opened(tmp_path)
    assert store.get([1, 2]) is None
    store.add([1, 2], [7, 8], False, 'a "line"\nof ß \ud800')
    store.add([12], [], True, "")
    for one in (store, opened(tmp_path)):
        assert one.get([1, 2]) == Stored((7, 8), False, 'a "line"\nof ß \ud800')
        assert one.get([12]) == Stored((), True, "")
        assert len(one) == 2


def test_a_killed_writer_leaves_nothing_for_good(tmp_path: Path) -> None:
    folder = opened(tmp_path).folder
    left = folder / ".manifest.json.0123456789ab.tmp"
    left.touch()
    opened(tmp_path)
    assert not left.exists()


def test_a_link_in_the_place_of_the_responses_is_not_followed(tmp_path: Path) -> None:
    folder = opened(tmp_path).folder
    (tmp_path / "victim").write_text("mine")
    (folder / "responses.jsonl").unlink()
    (folder / "responses.jsonl").symlink_to(tmp_path / "victim")
    with pytest.raises(DpkdError, match="it is a symbolic link"):
        opened(tmp_path)
    assert (tmp_path / "victim").read_text() == "mine"


def test_the_first_response_to_a_prompt_stays(tmp_path: Path) -> None:
    first, second = opened(tmp_path), opened(tmp_path)
    first.add([1], [5], False, "first")
    assert second.get([1]) is None
    second.add([1], [6], False, "second")
    assert second.get([1]) == Stored((5,), False, "first")
    assert len((first.folder / "responses.jsonl").read_text().splitlines()) == 1


CHANGES = {
    "model": {"model_fingerprint": "other"},
    "tokenizer": {"tokenizer_fingerprint": "other"},
    "seed": {"seed": 2},
    "temperature": {"sampling": SamplingSettings(temperature=0.7)},
    "top_p": {"sampling": SamplingSettings(top_p=0.9)},
    "top_k": {"sampling": SamplingSettings(top_k=5)},
    "max_new_tokens": {"sampling": SamplingSettings(max_new_tokens=5)},
}


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_keys_never_mix(tmp_path: Path, changes: dict[str, Any]) -> None:
    opened(tmp_path).add([1], [2], False, "")
    other = opened(tmp_path, **changes)
    assert other.get([1]) is None
    other.add([1], [3], False, "")
    assert opened(tmp_path).get([1]) == Stored((2,), False, "")


def test_every_sampling_setting_is_in_the_key_but_the_batch() -> None:
    swept = {name for name in CHANGES if name in SamplingSettings.model_fields}
    assert swept == set(SamplingSettings.model_fields) - {"batch_size"}


def test_batch_size_is_no_part_of_the_key(tmp_path: Path) -> None:
    opened(tmp_path).add([1], [2], False, "")
    assert opened(tmp_path, sampling=SamplingSettings(batch_size=3)).get([1]) is not None


def test_the_manifest_says_what_the_key_is(tmp_path: Path) -> None:
    store = opened(tmp_path)
    manifest = json.loads((store.folder / "manifest.json").read_text())
    assert manifest == {
        "format": "dpkd responses",
        "version": 1,
        "model": "m",
        "tokenizer": "t",
        "seed": 1,
        "sampling": {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": 256},
    }
    assert [path.name for path in tmp_path.iterdir()] == [store.folder.name]
    assert sorted(path.name for path in store.folder.iterdir()) == ["manifest.json", "responses.jsonl"]


@pytest.mark.parametrize("keep", range(1, 60, 7))
def test_a_torn_last_line_is_dropped(tmp_path: Path, keep: int) -> None:
    store = opened(tmp_path)
    store.add([1], [2], False, "whole")
    file = store.folder / "responses.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole + whole[:keep])
    again = opened(tmp_path)
    assert len(again) == 1
    again.add([3], [4], False, "after the crash")
    for one in (again, opened(tmp_path)):  # what was torn is gone from the file
        assert one.get([1]) == Stored((2,), False, "whole")
        assert one.get([3]) == Stored((4,), False, "after the crash")


def test_a_line_without_its_end_is_kept(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.add([1], [2], False, "whole")
    file = store.folder / "responses.jsonl"
    file.write_bytes(file.read_bytes()[:-1])
    again = opened(tmp_path)
    again.add([3], [4], False, "")
    assert len(again) == 2


def test_lines_that_are_no_responses_are_left_out(tmp_path: Path) -> None:
    store = opened(tmp_path)
    with (store.folder / "responses.jsonl").open("ab") as file:
        file.write(b'{"prompt": "x"}\n[1]\n\xff\xfe\n\n{"prompt": "x", "ids": null}\n')
    store.add([1], [2], False, "")
    assert len(store) == len(opened(tmp_path)) == 1


def test_a_bit_that_flipped_costs_one_response(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.add([1], [17], False, "one")
    store.add([2], [18], False, "two")
    file = store.folder / "responses.jsonl"
    file.write_bytes(file.read_bytes().replace(b"[17]", b"[16]"))
    again = opened(tmp_path)
    assert again.get([1]) is None
    assert again.get([2]) == Stored((18,), False, "two")


def _append(folder: str, own: int, count: int, start: Any) -> None:
    store = opened(Path(folder))
    start.wait(60)
    for i in range(count):
        store.add([own, i], [own] * 400, False, "x" * 5000)
        store.add([99, i], [own], False, "of the first to come")


def test_two_processes_append(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    start = spawn.Barrier(2)
    writers = [spawn.Process(target=_append, args=(str(tmp_path), own, 40, start)) for own in (1, 2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert [writer.exitcode for writer in writers] == [0, 0]
    store = opened(tmp_path)
    assert len(store) == len((store.folder / "responses.jsonl").read_text().splitlines()) == 120
    assert all(store.get([own, i]).response_ids == (own,) * 400 for own in (1, 2) for i in range(40))
    assert all(store.get([99, i]).response_ids in ((1,), (2,)) for i in range(40))


def test_a_writer_waits_for_the_other(tmp_path: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    store = opened(tmp_path)
    with (store.folder / "responses.jsonl").open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        writer = threading.Thread(target=store.add, args=([1], [2], False, "later"))
        writer.start()
        writer.join(0.3)
        assert writer.is_alive()
        fcntl.flock(other, fcntl.LOCK_UN)
        writer.join(60)
    assert opened(tmp_path).get([1]) == Stored((2,), False, "later")


def test_another_version_is_refused(tmp_path: Path) -> None:
    store = opened(tmp_path)
    file = store.folder / "manifest.json"
    manifest = json.loads(file.read_text())
    file.write_text(json.dumps({**manifest, "version": 7}))
    with pytest.raises(DpkdError, match=r"manifest.json has version 7, expected version 1 .* Move the folder"):
        opened(tmp_path)
    edited = json.dumps({**manifest, "seed": 5})
    for broken, word in (("{", "is damaged"), ("[]", "is damaged"), (edited, "is not one of dpkd's or was edited")):
        file.write_text(broken)
        with pytest.raises(DpkdError, match=word):
            opened(tmp_path)


def test_a_folder_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DpkdError, match=r"cannot be written or read: Not a directory.*text\.store"):
        opened(tmp_path / "file")


def test_default_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("DPKD_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert default_folder() == tmp_path / ".cache" / "dpkd" / "responses"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_folder() == tmp_path / "xdg" / "dpkd" / "responses"
    monkeypatch.setenv("DPKD_CACHE", str(tmp_path / "own"))
    assert default_folder() == tmp_path / "own" / "responses"
    key = {"model_fingerprint": "m", "tokenizer_fingerprint": "t", "sampling": SamplingSettings(), "seed": 1}
    assert ResponseStore.open(None, **key).folder.parent == tmp_path / "own" / "responses"


def saved(folder: Path, value: float = 0.0, place: int = 0, **config: Any) -> Path:
    folder.mkdir()
    weights = torch.arange(20_000, dtype=torch.float32)
    weights[place] += value
    save_file({"w": weights}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"layers": 2, "_name_or_path": str(folder), **config}))
    return folder


def test_model_fingerprint_of_a_folder(tmp_path: Path) -> None:
    own = model_fingerprint(saved(tmp_path / "a"))
    assert model_fingerprint(saved(tmp_path / "same", transformers_version="9")) == own
    different = {
        model_fingerprint(saved(tmp_path / "first", 1.0, 0)),
        model_fingerprint(saved(tmp_path / "last", 1.0, 19_999)),
        model_fingerprint(saved(tmp_path / "config", layers=3)),
    }
    assert len(different | {own}) == 4
    assert model_fingerprint(tmp_path / "a" / "model.safetensors") != own
    (tmp_path / "empty").mkdir()
    with pytest.raises(DpkdError, match=r"empty has no weights: expected \*.safetensors"):
        model_fingerprint(tmp_path / "empty")


def test_model_fingerprint_of_a_hub_model() -> None:
    found = {model_fingerprint("org/model", "c1"), model_fingerprint("org/model"), model_fingerprint("org/other", "c1")}
    assert len(found) == 3
    assert model_fingerprint("org/model", "main") in found
