"""Runs that are killed, meet a full disk or find damaged files: they go on, or say what is wrong."""

from __future__ import annotations

import io
import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from faults import Fault, dpkd
from rich.console import Console
from safetensors.torch import load_file, save_file
from toy_commands import TRAIN, fingerprint, write_toy

from dpkd.errors import DpkdError, SettingsError
from dpkd.io import read_json, remove_folder
from dpkd.run_folder import RunFolder
from dpkd.run_metrics import read_metrics
from dpkd.train import checkpoint, finish, run
from dpkd.train.nonfinite import NotFinite
from dpkd.train.resume import resume_folder


class Said(Console):
    """A console whose text is kept."""

    def __init__(self):
        super().__init__(file=io.StringIO(), width=500)

    @property
    def text(self):
        return self.file.getvalue()


@pytest.fixture
def finished(settings_of, quiet):
    """A run of 4 steps with a checkpoint at each of the last two, which is the default."""
    return run.train(settings_of("kd", {"train.steps": 4, "train.save_every": 1}), console=quiet)


def unfinished(folder: RunFolder) -> RunFolder:
    folder.marker.unlink()
    return folder


# --- killed at any point ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    """A folder with toy models and data, and what an uninterrupted `dpkd train` makes there."""
    folder = tmp_path_factory.mktemp("commands")
    write_toy(folder / "toy")
    whole = dpkd(TRAIN, folder / "whole")
    assert whole.kind == "ok", whole.text
    return folder, fingerprint(folder / "whole/run"), len(whole.calls)


@pytest.mark.parametrize("place", [0.0, 0.01, 0.03, 0.3, 0.6, 0.9, 0.94, 0.98, 1.0])
def test_a_run_that_is_killed_ends_like_one_that_is_not(place, commands, tmp_path):
    folder, whole, calls = commands
    here = folder / f"killed-{place}"
    killed = dpkd(TRAIN, here, Fault("kill", int(place * (calls - 1))))
    assert killed.kind == "killed", killed.text
    again = dpkd(["train", "--resume", "run"], here)
    if "is not a run folder" in again.text:  # nothing but run.json is there yet: it begins anew
        again = dpkd(TRAIN, here)
    assert again.kind == "ok" or "is finished" in again.text, again.text
    assert fingerprint(here / "run") == whole
    assert not list((here / "run").rglob("*.tmp"))


@pytest.mark.parametrize("place", [0.0, 0.02, 0.5, 0.8, 0.97])
@pytest.mark.parametrize("kind", ["full", "torn"])
def test_a_full_disk_is_a_sentence_and_the_run_goes_on_later(place, kind, commands, tmp_path):
    folder, whole, calls = commands
    here = folder / f"{kind}-{place}"
    failed = dpkd(TRAIN, here, Fault(kind, int(place * calls)))
    finished = place > 0.9 and failed.kind == "ok"  # only a removal of what is no longer needed failed
    if not finished:
        assert (failed.kind, failed.code) == ("refused", 1), failed.text
        assert "disk is full" in failed.text or "No space left" in failed.text
    again = dpkd(["train", "--resume", "run"], here)
    if "is not a run folder" in again.text:
        again = dpkd(TRAIN, here)
    assert again.kind == "ok" or (finished and "is finished" in again.text), again.text
    assert fingerprint(here / "run") == whole  # the next call removes what was left over


def test_a_hangup_saves_as_a_request_to_stop_does(commands):
    folder, _, _ = commands
    here = folder / "hangup"
    here.mkdir()
    long = [*TRAIN, "--set", "train.steps=100000"]
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "dpkd.cli.main", *long], cwd=here, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not (here / "run/metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGHUP)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGHUP
    assert "continue with: dpkd train --resume run" in said
    assert checkpoint.latest(here / "run/checkpoints") is not None


@pytest.mark.parametrize(("seconds", "saved"), [(0.0, [1, 2, 3]), (600.0, [3])])
def test_by_default_a_run_saves_after_some_time_and_at_its_end(seconds, saved, settings_of, quiet, monkeypatch):
    assert checkpoint.SAVE_SECONDS == 600
    monkeypatch.setattr(checkpoint, "SAVE_SECONDS", seconds)
    resolved = settings_of("kd", {"train.steps": 3, "train.keep_checkpoints": 9})
    assert resolved.settings.train.save_every == "auto"
    found = run.train(resolved, console=quiet).checkpoints.glob("step-*")
    assert sorted(int(path.name.removeprefix("step-")) for path in found) == saved


def test_what_a_finished_run_could_not_remove_goes_at_the_next_call(finished, quiet):
    left = [finished.best / "step-1", finished.path / ".model.0.tmp", finished.checkpoints / ".step-00000002.0.tmp"]
    for folder in left:
        folder.mkdir(parents=True)
        (folder / "file").touch()
    with pytest.raises(DpkdError, match="is finished"):
        resume_folder(finished.path, console=quiet)
    assert [folder for folder in left if folder.exists()] == []
    assert finished.is_finished


# --- missing and damaged files ---------------------------------------------------------------------------------------


def test_a_lost_run_json_is_written_again(finished, quiet):
    before = read_json(finished.facts)
    unfinished(finished).facts.unlink()
    console = Said()
    resume_folder(finished.path, console=console)
    assert "run.json is lost: written again" in console.text
    assert read_json(finished.facts)["data"] == before["data"]
    assert finished.is_finished


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"data": 3}'])
def test_a_damaged_run_json_is_named(damage, finished, quiet):
    unfinished(finished).facts.write_bytes(damage)
    with pytest.raises(DpkdError, match=r"run\.json is damaged: .*Delete it"):
        resume_folder(finished.path, console=quiet)


def test_a_run_is_finished_once_all_of_it_is(finished, quiet):
    card = finished.card.read_text()
    unfinished(finished).card.unlink()
    resume_folder(finished.path, console=quiet)
    assert finished.card.read_text() == card
    with pytest.raises(DpkdError, match=r"is finished: .*--set train\.steps=N"):
        resume_folder(finished.path, console=quiet)


CHECKPOINT_FILES = ("weights.safetensors", "optimizer.safetensors", "random-0.safetensors", "state.json")


@pytest.mark.parametrize("name", CHECKPOINT_FILES)
@pytest.mark.parametrize("damage", ["flip", "cut", "lost"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(name, damage, finished, quiet):
    newest = checkpoint.latest(finished.checkpoints)
    expected = load_file(finished.model / "model.safetensors")
    _damage(newest.path / name, damage)
    unfinished(finished)
    console = Said()
    resume_folder(finished.path, console=console)
    assert f"the checkpoint {newest.path} is damaged: " in console.text
    assert "after step 3 of 4" in console.text
    found = load_file(finished.model / "model.safetensors")
    assert all((found[key] == value).all() for key, value in expected.items())
    assert newest.path.with_name(f"{newest.path.name}.damaged").is_dir()


def _damage(file: Path, damage: str) -> None:
    content = bytearray(file.read_bytes())
    if damage == "lost":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) * 3 // 4] ^= 1
        file.write_bytes(content)


def test_lost_responses_of_the_student_are_noticed(settings_of, quiet):
    folder = run.train(
        settings_of("minillm", {"train.steps": 4, "train.save_every": 1, "text.every": 4}), console=quiet
    )
    remove_folder(checkpoint.latest(folder.checkpoints).path)
    sources = checkpoint.latest(folder.checkpoints).path / "sources.json"
    assert json.loads(sources.read_text())["main"]["responses"]
    sources.write_text('{"main": {"responses": []}}')
    unfinished(folder)
    with pytest.raises(DpkdError, match=r"no checkpoint in .* is whole"):
        resume_folder(folder.path, console=quiet)


def test_a_run_without_a_checkpoint_says_so(finished, quiet):
    for one in list(finished.checkpoints.iterdir()):
        for file in one.iterdir():
            file.unlink()
        one.rmdir()
    unfinished(finished)
    console = Said()
    resume_folder(finished.path, console=console)
    assert "has no checkpoint yet: training from the first step" in console.text


def test_a_damaged_model_is_not_evaluated(finished):
    from dpkd.evaluation.target import model_of

    assert model_of(str(finished.path)).model == str(finished.model)
    _damage(finished.model / "model.safetensors", "flip")
    said = r"model\.safetensors is not the file that the run saved"
    with pytest.raises(DpkdError, match=said):
        model_of(str(finished.path))
    with pytest.raises(DpkdError, match=said):
        resume_folder(finished.path, assignments=["train.steps=6"], console=Console(quiet=True))


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl", "run.json"])
@pytest.mark.parametrize("damage", ["digit", "lost"])
def test_damaged_records_of_a_finished_run_are_named(name, damage, finished, quiet):
    """By what reads them: a report, a comparison, and a run that is extended."""
    from dpkd.report.reading import read_run

    read_run(finished.path)
    file = finished.path / name
    content = file.read_text()
    if damage == "lost":
        file.unlink()
    else:
        file.write_text(content.replace("1", "2", 1))
        assert file.read_text() != content
    said = rf"{name} is (lost|not the file that the run wrote) \(finished\.json has its checksum\)"
    with pytest.raises(DpkdError, match=said):
        read_run(finished.path)
    with pytest.raises(DpkdError, match=said):
        resume_folder(finished.path, assignments=["train.steps=6"], console=quiet)
    assert finished.is_finished


def test_settings_that_lost_their_second_half_are_named_by_all_who_read_them(finished, quiet):
    """Half a file of YAML is a file of YAML: without its checksum, a report would leave out the rest."""
    from dpkd.evaluation.target import find_target
    from dpkd.report.reading import read_run

    lines = finished.config.read_text().splitlines(keepends=True)
    finished.config.write_text("".join(lines[: len(lines) // 2]))
    said = r"config\.resolved\.yaml is not the file .*Restore it; run\.json has the command of the run"
    with pytest.raises(DpkdError, match=said):
        read_run(finished.path)
    with pytest.raises(DpkdError, match=said):
        find_target(str(finished.path), None)


# --- the development set ---------------------------------------------------------------------------------------------


def dev(toy: Path, **more):
    return {"path": str(toy / "data.jsonl"), "limit": 2, "metric": "nll", "every": 1, "max_new_tokens": 4, **more}


def test_the_best_model_is_exchanged_before_the_run_counts_as_finished(settings_of, toy, quiet, monkeypatch):
    """Killed after each part of `finish`: the model that is there is the best one, or none."""
    changes = {"train.steps": 4, "train.lr": 5.0, "train.warmup_steps": 1, "dev": dev(toy)}
    whole = run.train(settings_of("kd", changes), console=quiet)
    assert read_json(whole.marker)["best_step"] < 4
    best, last = ((whole.path / name / "model.safetensors").read_bytes() for name in ("model", "last"))
    assert best != last

    class Killed(BaseException):
        pass

    for part in ("save_model", "link_folder", "write_model_card", "write_json"):
        path = whole.path.with_name(part)
        with monkeypatch.context() as patch:
            real = getattr(finish, part)

            def kill(*arguments, _real=real, **options):
                _real(*arguments, **options)
                raise Killed

            patch.setattr(finish, part, kill)
            with pytest.raises(Killed):
                run.train(settings_of("kd", changes | {"output": str(path)}), console=quiet)
        model = path / "model" / "model.safetensors"
        assert not model.exists() or model.read_bytes() == best
        if not RunFolder(path).is_finished:
            resume_folder(path, console=quiet)
        assert model.read_bytes() == best
        assert (path / "last/model.safetensors").read_bytes() == last


def test_a_changed_development_set_is_noticed(settings_of, toy, quiet, tmp_path):
    rows = tmp_path / "dev.jsonl"
    rows.write_bytes((toy / "data.jsonl").read_bytes())
    folder = run.train(settings_of("kd", {"train.steps": 2, "dev": dev(toy, path=str(rows))}), console=quiet)
    lines = rows.read_text().splitlines(keepends=True)
    rows.write_text("".join([lines[1], lines[0]]))
    unfinished(folder)
    with pytest.raises(DpkdError, match=r"the development set \(dev\.path\) changed"):
        resume_folder(folder.path, console=quiet)


def test_an_early_stop_stays_one(settings_of, toy, quiet, monkeypatch):
    class Killed(BaseException):
        pass

    def kill(*arguments):
        raise Killed

    resolved = settings_of("kd", {"train.steps": 9, "train.lr": 5.0, "dev": dev(toy, patience=1)})
    folder = RunFolder(Path(resolved.settings.output))
    with monkeypatch.context() as patch:
        patch.setattr(finish, "write_model_card", kill)
        with pytest.raises(Killed):
            run.train(resolved, console=quiet)
    steps = checkpoint.latest(folder.checkpoints).step
    assert steps < 9
    resume_folder(folder.path, console=quiet)
    assert read_json(folder.marker)["step"] == steps
    assert read_metrics(folder.metrics)[-1]["step"] == steps


# --- numbers that are not finite, other settings ---------------------------------------------------------------------


def test_weights_that_are_not_finite_are_never_saved(settings_of, quiet):
    resolved = settings_of("kd", {"train.lr": 1e39, "train.steps": 1})
    with pytest.raises(NotFinite, match="is not finite, so no checkpoint of it is saved"):
        run.train(resolved, console=quiet)
    folder = RunFolder(Path(resolved.settings.output))
    assert not folder.model.exists()
    assert checkpoint.latest(folder.checkpoints) is None


def test_a_run_that_exploded_goes_on_with_a_lower_rate(settings_of, quiet):
    changes = {"train.lr": 1e39, "train.steps": 4, "train.save_every": 1, "train.warmup_steps": 2, "train.clip": None}
    resolved = settings_of("sft", changes)
    with pytest.raises(NotFinite, match=r"--set train\.lr="):
        run.train(resolved, console=quiet)
    folder = RunFolder(Path(resolved.settings.output))
    kept = checkpoint.latest(folder.checkpoints)
    if kept is not None:
        weights = load_file(kept.path / "weights.safetensors")
        assert all(bool(value.isfinite().all()) for value in weights.values())
    resume_folder(folder.path, assignments=["train.lr=1e-3"], console=quiet)
    assert folder.is_finished
    assert read_json(folder.facts)["changes"][0]["settings"] == {"train.lr": 1e-3}
    assert "lr: 0.001" in folder.config.read_text()


@pytest.mark.parametrize("setting", ["seed=3", "train.batch_size=2", "data.limit=3", "student.layers=1"])
def test_a_setting_that_decides_the_data_is_refused(setting, finished, quiet):
    with pytest.raises(SettingsError, match=rf"--set {setting.split('=')[0]}: a run keeps this setting"):
        resume_folder(finished.path, assignments=[setting], console=quiet)


def test_a_finished_run_is_extended(settings_of, finished, quiet, tmp_path):
    before = (finished.model / "model.safetensors").read_bytes()
    resume_folder(finished.path, assignments=["train.steps=6", "train.schedule=constant"], console=quiet)
    assert [line["step"] for line in read_metrics(finished.metrics)] == [1, 2, 3, 4, 5, 6]
    assert read_json(finished.marker)["step"] == 6
    assert (finished.path / "model-4/model.safetensors").read_bytes() == before
    assert (finished.model / "model.safetensors").read_bytes() != before


def test_the_best_model_of_a_finished_run_stays_the_best_when_it_is_extended(settings_of, toy, quiet):
    folder = run.train(
        settings_of("kd", {"train.steps": 3, "train.lr": 5.0, "train.warmup_steps": 1, "dev": dev(toy)}), console=quiet
    )
    best = read_json(folder.marker)["best_step"]
    before = (folder.model / "model.safetensors").read_bytes()
    resume_folder(folder.path, assignments=["train.steps=5", "train.lr=0.5"], console=quiet)
    if read_json(folder.marker)["best_step"] == best:
        assert (folder.model / "model.safetensors").read_bytes() == before
    assert read_json(folder.marker)["step"] == 5


# --- others on the same machine --------------------------------------------------------------------------------------


def test_two_processes_do_not_write_one_run(finished, quiet):
    unfinished(finished)
    with (
        finished.lock(),
        pytest.raises(DpkdError, match=rf"is being written by another process: process {os.getpid()}"),
    ):
        resume_folder(finished.path, console=quiet)
    resume_folder(finished.path, console=quiet)


def test_files_of_a_run_can_be_read_by_whom_the_umask_allows(settings_of, quiet):
    before = os.umask(0o022)
    try:
        folder = run.train(settings_of("kd", {"student.lora": {"r": 2}}), console=quiet)
    finally:
        os.umask(before)
    modes = {file: stat.S_IMODE(file.stat().st_mode) for file in folder.path.rglob("*") if file.is_file()}
    assert len(modes) > 10
    assert set(modes.values()) == {0o644}, modes


def test_a_checkpoint_of_another_version_is_refused(finished, quiet):
    state = checkpoint.latest(finished.checkpoints).path / "state.json"
    state.write_text(json.dumps({"step": 4, "processes": 1, "loop": {}, "format": 9}))
    unfinished(finished)
    with pytest.raises(DpkdError, match="has format 9, expected 4: another version of dpkd wrote it"):
        resume_folder(finished.path, console=quiet)


def test_an_optimizer_that_was_swapped_is_noticed(finished, quiet):
    """Whole as a file, but not the one that was saved."""
    newest, before = sorted(finished.checkpoints.iterdir(), reverse=True)
    tensors = load_file(before / "optimizer.safetensors")
    save_file(tensors, newest / "optimizer.safetensors")
    unfinished(finished)
    console = Said()
    resume_folder(finished.path, console=console)
    assert "optimizer.safetensors has a wrong checksum" in console.text
