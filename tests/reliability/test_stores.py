"""Stores, fingerprints and files of samples: nothing stale or damaged is taken for what was asked for."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import pytest
import torch
from faults import Fault, dpkd
from safetensors.torch import load_file, save_file
from toy_commands import CACHE, COMPARE, EVAL, LIMITS, SWEEP, write_toy

from dpkd.errors import DpkdError
from dpkd.models import fingerprint
from dpkd.models.fingerprint import model_fingerprint
from dpkd.teachers.store_manifest import Manifest, read_manifest, write_manifest
from dpkd.teachers.store_shards import Shards


def shards(folder: Path, *names: str) -> Shards:
    """A store with one shard for each name."""
    found = Shards(folder)
    for name in names:
        found.add({name: {"logps": torch.tensor([float(len(name)), -1.0])}})
    return found


def test_a_lost_list_never_shifts_the_numbers_of_the_others(tmp_path):
    shards(tmp_path, "a", "bb", "ccc")
    (tmp_path / "shard-00000.json").unlink()
    found = Shards(tmp_path)
    assert "a" not in found
    assert found.read("bb")["logps"].tolist() == [2.0, -1.0]
    with pytest.raises(DpkdError, match=r"shard-00000\.safetensors or its list is lost"):
        found.read("a")
    found.add({"dddd": {"logps": torch.tensor([4.0])}})
    again = Shards(tmp_path)
    assert again.read("ccc")["logps"].tolist() == [3.0, -1.0]
    assert again.read("dddd")["logps"].tolist() == [4.0]
    assert sorted(file.name for file in tmp_path.glob("*.json")) == [f"shard-0000{n}.json" for n in (1, 2, 3)]


@pytest.mark.parametrize("name", ["shard-00000.safetensors", "shard-00000.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "swap"])
def test_a_damaged_shard_is_named_when_the_store_is_opened(name, damage, tmp_path):
    shards(tmp_path, "a", "bb")
    file = tmp_path / name
    content = bytearray(file.read_bytes())
    if damage == "swap":
        shutil.copy(tmp_path / name.replace("00000", "00001"), file)
    else:
        content[len(content) * 2 // 3] ^= 1
        file.write_bytes({"flip": bytes(content), "cut": bytes(content[: len(content) // 2]), "empty": b""}[damage])
    with pytest.raises(DpkdError, match=r"shard-00000\.\w+ is damaged.*run `dpkd cache` again"):
        Shards(tmp_path)


def test_a_damaged_manifest_of_a_store_is_named(tmp_path):
    manifest = Manifest("sampled", 8, "teacher", "t", "tokenizer", 257, (), "data", "template", "float16", 0)
    write_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path) == manifest
    file = tmp_path / "manifest.json"
    file.write_text(file.read_text().replace('"k": 8', '"k": 9'))
    with pytest.raises(DpkdError, match=r"manifest\.json cannot be read: it is damaged: its checksum is wrong"):
        read_manifest(tmp_path)


def test_a_lost_shard_is_named(tmp_path):
    shards(tmp_path, "a", "bb")
    (tmp_path / "shard-00001.safetensors").unlink()
    with pytest.raises(DpkdError, match=r"shard-00001\.safetensors is lost: shard-00001\.json lists its 1 responses"):
        Shards(tmp_path)


def test_every_tensor_counts_in_the_fingerprint_of_a_model(tmp_path, monkeypatch):
    monkeypatch.setenv("DPKD_CACHE", str(tmp_path / "cache"))
    write_toy(tmp_path / "toy")
    model = tmp_path / "toy/model"
    tensors = load_file(model / "model.safetensors")
    found = {model_fingerprint(model)}
    for name in tensors:
        changed = {key: value.clone() for key, value in tensors.items()}
        changed[name].view(-1)[-1] += 1
        save_file(changed, model / "model.safetensors", {"format": "pt"})
        found.add(model_fingerprint(model))
    assert len(found) == len(tensors) + 1


def test_a_file_is_hashed_once_until_it_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("DPKD_CACHE", str(tmp_path / "cache"))
    hashed = []
    real = fingerprint.sha256
    monkeypatch.setattr(fingerprint, "sha256", lambda file: hashed.append(file) or real(file))
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"1" * 100)
    first = fingerprint.weights_hash(file)
    assert fingerprint.weights_hash(file) == first
    assert len(hashed) == 2  # too young to be remembered: it could change within one tick of the clock
    monkeypatch.setattr(fingerprint, "SETTLED_NS", -1)
    assert [fingerprint.weights_hash(file) for _ in range(3)] == [first] * 3
    assert len(hashed) == 3
    before = file.stat()
    file.write_bytes(b"1" * 99 + b"2")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))  # as `cp --preserve` and `rsync -t` leave it
    assert fingerprint.weights_hash(file) != first
    (tmp_path / "cache/fingerprints.jsonl").write_text("damaged\n{}\n")
    assert fingerprint.weights_hash(file) == real(file)


SAMPLE = [
    *("sample", "--model", "../toy/model", "--data", "../toy/data.jsonl", "--output", "answers.jsonl"),
    *("--max-new-tokens", "4", "--batch-size", "2"),
]


@pytest.fixture
def toy(tmp_path):
    write_toy(tmp_path / "toy")
    return tmp_path


def test_two_calls_do_not_write_one_file_of_samples(toy):
    from dpkd.locks import lock

    (toy / "here").mkdir()
    with lock(toy / "here/.answers.jsonl.lock", "answers.jsonl"):
        refused = dpkd(SAMPLE, toy / "here")
    assert refused.code == 1
    assert f"is being written by another process: process {os.getpid()} on " in refused.text
    assert dpkd(SAMPLE, toy / "here").kind == "ok"
    assert len((toy / "here/answers.jsonl").read_text().splitlines()) == 12
    left = {path.name for path in (toy / "here").iterdir()} - {"cache"}
    assert left == {"answers.jsonl", "answers.jsonl.settings.json"}


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"\xff"])
def test_a_damaged_settings_file_of_samples_is_named(damage, toy):
    assert dpkd(SAMPLE, toy / "here").kind == "ok"
    (toy / "here/answers.jsonl.settings.json").write_bytes(damage)
    refused = dpkd(SAMPLE, toy / "here")
    assert (refused.kind, refused.code) == ("refused", 1)
    assert "answers.jsonl.settings.json is damaged" in refused.text


def test_a_damaged_line_of_samples_is_named(toy):
    assert dpkd(SAMPLE, toy / "here").kind == "ok"
    file = toy / "here/answers.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join([lines[0], lines[1][:20] + "\n", *lines[2:]]))
    refused = dpkd(SAMPLE, toy / "here")
    assert (refused.kind, refused.code) == ("refused", 1)
    assert "answers.jsonl:2: expected one JSON object" in refused.text


def test_two_evaluations_do_not_write_one_folder(toy):
    from dpkd.locks import lock

    call = [
        *("eval", "--model", "../toy/model", "--data", "../toy/data.jsonl", "--output", "scores"),
        *("--greedy", "--max-new-tokens", "4"),
    ]
    (toy / "here/scores").mkdir(parents=True)
    with lock(toy / "here/scores/.lock", "scores"):
        refused = dpkd(call, toy / "here")
    assert refused.code == 1
    assert "is being written by another process" in refused.text
    assert dpkd(call, toy / "here").kind == "ok"


def test_a_store_is_written_by_one_call_at_a_time(toy):
    from dpkd.locks import lock

    call = [
        *("cache", "--loss", "kd", "--teacher", "../toy/model", "--data", "../toy/data.jsonl", "--output", "store"),
        *("--set", "student.init=layers", "--set", "student.layers=1", "--kind", "sampled", "--k", "8", *LIMITS),
    ]
    (toy / "here/store").mkdir(parents=True)
    with lock(toy / "here/store/.lock", "store"):
        refused = dpkd(call, toy / "here")
    assert refused.code == 1
    assert "is being written by another process" in refused.text


@pytest.mark.parametrize("command", [EVAL, SAMPLE, CACHE, SWEEP], ids=lambda command: command[0])
def test_the_next_call_removes_what_a_killed_one_left(command, toy):
    renames = len(dpkd(command, toy / "whole", Fault(calls=("replace",))).calls)
    for at in sorted({0, renames // 2, renames - 1}):
        here = toy / f"killed-{at}"
        assert dpkd(command, here, Fault("kill", at, calls=("replace",))).kind == "killed"
        assert list(here.rglob(".*.tmp"))
        again = dpkd(command, here)
        assert again.kind == "ok", again.text
        assert list(here.rglob(".*.tmp")) == []


def test_what_belongs_to_another_file_of_samples_stays(toy):
    """Two calls may write two files of one folder at the same time."""
    (toy / "here").mkdir()
    own, other = (toy / f"here/.{name}.settings.json.0123456789ab.tmp" for name in ("answers.jsonl", "other.jsonl"))
    for file in (own, other):
        file.touch()
    assert dpkd(SAMPLE, toy / "here").kind == "ok"
    assert (own.exists(), other.exists()) == (False, True)


EVALUATION_DAMAGES = {
    "a digit of a score": ("scores.json", lambda content: content.replace(b'"mean": ', b'"mean": 1', 1)),
    "a cut file of answers": ("predictions-1.jsonl", lambda content: b"".join(content.splitlines(True)[:-1])),
    "a changed answer": ("predictions-2.jsonl", lambda content: content.replace(b": true", b": false", 1)),
}


@pytest.mark.parametrize("damage", EVALUATION_DAMAGES)
def test_a_damaged_evaluation_is_named(damage, toy):
    """By all that reads it: a score that was changed is never compared, nor answers that were not scored."""
    assert dpkd(EVAL, toy / "here").kind == "ok"
    assert dpkd(COMPARE, toy / "here").kind == "ok"
    assert dpkd(EVAL, toy / "here").kind == "ok"
    name, change = EVALUATION_DAMAGES[damage]
    file = toy / "here/evaluations/data" / name
    before = file.read_bytes()
    file.write_bytes(change(before))
    assert file.read_bytes() != before
    reader = COMPARE if name == "scores.json" else EVAL
    refused = dpkd(reader, toy / "here")
    assert (refused.kind, refused.code) == ("refused", 1), refused.text
    assert f"{name} is damaged: " in " ".join(refused.text.split())


def test_strict_json_everywhere(toy):
    """A score that is not finite is no bare NaN in a file."""
    from dpkd.evaluation.results import Evaluation, Metric, write_scores

    evaluation = Evaluation(rows=1, seeds=(1,), metrics={"nll": Metric((float("nan"),))})
    write_scores(evaluation, toy)
    json.loads((toy / "scores.json").read_text(), parse_constant=pytest.fail)


def test_a_half_written_file_of_the_cache_is_no_hindrance(tmp_path, monkeypatch):
    monkeypatch.setenv("DPKD_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/fingerprints.jsonl").write_text('{"file": [1, 2, 3')
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"x")
    os.utime(file, (time.time() - 100, time.time() - 100))
    assert len(fingerprint.weights_hash(file)) == 64
