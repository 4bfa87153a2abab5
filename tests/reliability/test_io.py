"""The one atomic write, the one log, the one lock: whole or as before, whatever the file system does."""

from __future__ import annotations

import json
import multiprocessing
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from dpkd.errors import DpkdError
from dpkd.io import JsonLog, StorageError, open_log, read_json, whole_file, whole_folder, write_json, write_text
from dpkd.locks import folder_lock, lock


@pytest.mark.parametrize("call", ["write", "fsync", "replace", "chmod"])
@pytest.mark.parametrize("torn", [False, True])
def test_a_file_is_old_or_new_whatever_fails(call, torn, faults, tmp_path: Path) -> None:
    file = tmp_path / "facts.json"
    write_json(file, {"state": "old"})
    said = []
    for at in range(3):
        with faults(call, at, torn=torn):
            try:
                write_json(file, {"state": "new"})
                expected = "new"
            except StorageError as error:
                said.append(str(error))
                # The flush of the folder comes after the exchange: then the new file is there, and whole.
                expected = "new" if (call, at) == ("fsync", 1) else "old"
        assert read_json(file) == {"state": expected}
        assert [entry.name for entry in tmp_path.iterdir()] == ["facts.json"]
        write_json(file, {"state": "old"})
    assert said
    assert all("the disk is full" in text for text in said)


@pytest.mark.parametrize("call", ["fsync", "rename", "mkdir"])
def test_a_folder_is_old_or_new_whatever_fails(call, faults, tmp_path: Path) -> None:
    def write(state: str) -> None:
        with whole_folder(tmp_path / "model") as folder:
            (folder / "a").write_text(state)
            (folder / "b").write_text(state)

    write("old")
    failed = 0
    for at in range(4):
        with faults(call, at, once=call == "rename"):
            try:
                write("new")
            except StorageError:
                failed += 1
        found = {(tmp_path / "model" / name).read_text() for name in "ab"}
        assert found in ({"old"}, {"new"})
        write("old")
    assert failed
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_a_writer_that_raises_leaves_what_was_there(tmp_path: Path) -> None:
    write_text(tmp_path / "file", "old")
    for whole in (whole_file, whole_folder):
        with pytest.raises(ZeroDivisionError), whole(tmp_path / "file"):
            raise ZeroDivisionError
    assert (tmp_path / "file").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_modes_follow_the_umask(umask, mode, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        write_text(tmp_path / "text", "x")
        JsonLog(tmp_path / "log").append({})
        with whole_folder(tmp_path / "folder") as folder:
            os.close(os.open(folder / "private", os.O_CREAT | os.O_WRONLY, 0o600))
        with whole_file(tmp_path / "replaced") as unfinished:  # as safetensors does it
            os.close(os.open(tmp_path / "own", os.O_CREAT | os.O_WRONLY, 0o600))
            (tmp_path / "own").rename(unfinished)
    finally:
        os.umask(before)
    for name in ("text", "log", "folder/private", "replaced"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == mode, name


def test_a_link_in_the_place_of_a_file_is_replaced_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "facts.json").symlink_to(tmp_path / "victim")
    write_json(tmp_path / "facts.json", {})
    assert (tmp_path / "victim").read_text() == "mine"
    assert not (tmp_path / "facts.json").is_symlink()
    (tmp_path / ".lock").symlink_to(tmp_path / "victim")
    with pytest.raises(StorageError), lock(tmp_path / ".lock", "x"):
        pass
    assert (tmp_path / "victim").read_text() == "mine"


def test_a_link_in_the_place_of_a_log_is_refused_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "metrics.jsonl").symlink_to(tmp_path / "victim")
    with pytest.raises(StorageError, match=r"metrics\.jsonl cannot be written or read: it is a symbolic link"):
        JsonLog(tmp_path / "metrics.jsonl").append({"n": 1})
    with pytest.raises(StorageError, match="it is a symbolic link"), open_log(tmp_path / "metrics.jsonl"):
        pass
    assert (tmp_path / "victim").read_text() == "mine"


def test_a_pipe_is_written_to(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    found: list[str] = []
    reader = threading.Thread(target=lambda: found.append((tmp_path / "pipe").read_text()))
    reader.start()
    write_text(tmp_path / "pipe", "text")
    reader.join(10)
    assert found == ["text"]


def test_json_is_strict_and_names_damage(tmp_path: Path) -> None:
    file = write_json(tmp_path / "x.json", {"a": float("nan"), "b": [float("inf"), 1.5]})
    assert json.loads(file.read_text(), parse_constant=pytest.fail) == {"a": "NaN", "b": ["Infinity", 1.5]}
    for damage in ("", "{", "[1]", '{"a": ' + "[" * 100_000):
        file.write_text(damage)
        with pytest.raises(DpkdError, match=r"x\.json is damaged: expected a JSON object.*Delete it"):
            read_json(file, "Delete it.")


@pytest.mark.parametrize("torn", [False, True])
def test_a_line_that_did_not_fit_leaves_the_log_as_it_was(torn, faults, tmp_path: Path) -> None:
    log = JsonLog(tmp_path / "log.jsonl")
    log.append({"n": 1})
    with faults("write", 0, torn=torn), pytest.raises(StorageError, match="the disk is full"):
        log.append({"n": 2}, {"n": 3})
    assert (tmp_path / "log.jsonl").read_bytes() == b'{"n": 1}\n'
    log.append({"n": 4})
    assert log.rows() == [{"n": 1}, {"n": 4}]


def test_a_log_cut_at_any_byte_is_continued(tmp_path: Path) -> None:
    file = tmp_path / "log.jsonl"
    JsonLog(file).append({"text": "é" * 40_000}, {"n": 2})  # longer than one block that is read from the end
    content = file.read_bytes()
    for size in (*range(12), *range(len(content) - 14, len(content) + 1)):
        file.write_bytes(content[:size])
        before = JsonLog(file).rows()
        JsonLog(file).append({"n": 3})
        assert JsonLog(file).rows() == [*before, {"n": 3}]
    for zeros in (b"\0" * 70_000, b'{"n": 1}\0\0'):  # what a power cut leaves behind
        file.write_bytes(b'{"n": 1}\n' + zeros)
        JsonLog(file).append({"n": 3})
        assert JsonLog(file).rows() == [{"n": 1}, {"n": 3}]


def _hold(path: str, held, release) -> None:
    with lock(Path(path), "runs/kd-1"):
        held.set()
        release.wait(60)


def test_a_lock_names_its_owner_and_dies_with_it(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    held, release = spawn.Event(), spawn.Event()
    owner = spawn.Process(target=_hold, args=(str(tmp_path / ".lock"), held, release))
    owner.start()
    assert held.wait(60)
    said = rf"runs/kd-1 is being written by another process: process {owner.pid} on \S+, since \d{{4}}-"
    with pytest.raises(DpkdError, match=said), lock(tmp_path / ".lock", "runs/kd-1"):
        pass
    owner.kill()
    owner.join(60)
    assert (tmp_path / ".lock").exists()  # stale, and no hindrance
    with lock(tmp_path / ".lock", "runs/kd-1"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_who_locks_a_folder_clears_it_of_what_killed_writers_left(tmp_path: Path) -> None:
    """Our own temporary files and folders, and those of the writer of safetensors; nothing while another writes."""
    left = [tmp_path / name for name in (".scores.json.0123456789ab.tmp", ".tmp5K9fF8", ".model.0123456789ab.tmp")]
    kept = [tmp_path / name for name in (".tmp", "a.tmp", "scores.json", ".hidden")]

    def leave() -> None:
        left[2].mkdir(exist_ok=True)
        for file in (*left[:2], *kept, left[2] / "weights"):
            file.touch()

    leave()
    with folder_lock(tmp_path):
        assert sorted(tmp_path.iterdir()) == sorted([*kept, tmp_path / ".lock"])
        leave()
        with pytest.raises(DpkdError, match="is being written by another process"), folder_lock(tmp_path):
            pass
        assert all(path.exists() for path in (*left, *kept))


def test_one_of_many_gets_the_lock(tmp_path: Path) -> None:
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom dpkd.locks import folder_lock, lock\n"
        "for _ in range(50):\n"
        "    with lock(Path(sys.argv[1]) / '.lock', 'x', wait=True):\n"
        "        file = Path(sys.argv[1]) / 'count'\n"
        "        file.write_text(str(int(file.read_text()) + 1))\n"
    )
    (tmp_path / "count").write_text("0")
    writers = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)]) for _ in range(4)]
    assert [writer.wait(120) for writer in writers] == [0] * 4
    assert (tmp_path / "count").read_text() == "200"
