"""What a run chooses by itself, and what it says before it loads a weight."""

from __future__ import annotations

import io
import re

import pytest
import torch
from rich.console import Console

from dpkd.config.layers import Layer
from dpkd.config.resolve import resolve
from dpkd.errors import DpkdError, SettingsError
from dpkd.models import device as devices
from dpkd.plugins import load_registry
from dpkd.train import defaults, run
from dpkd.train.defaults import default_rate, with_defaults
from dpkd.train.plan import dry_run, make_plan
from dpkd.train.progress import Display


def _settings(toy, loss="kd", **changes):
    values = {
        "teacher.model": str(toy / "teacher"),
        "student.model": str(toy / "gpt2"),
        "data.path": str(toy / "data.jsonl"),
        "train.device": "cpu",
        "train.steps": 1,
    } | changes
    layers = [Layer("test", {"loss": {"name": loss}})]
    for path, value in values.items():
        for key in reversed(path.split(".")):
            value = {key: value}
        layers.append(Layer("test", value))
    return resolve(layers, load_registry())


@pytest.fixture
def heard():
    """A display, and all that it said."""
    console = Console(record=True, width=200, file=io.StringIO())
    return Display(console), console.export_text


@pytest.mark.parametrize(
    ("parameters", "full", "adapters"),
    [
        (124_439_808, 5e-4, 1e-3),  # GPT-2
        (354_823_168, 5e-5, 5e-4),  # GPT-2 medium
        (494_032_768, 5e-5, 5e-4),  # Qwen2.5-0.5B
        (7_615_616_512, 1e-5, 2e-4),  # Qwen2.5-7B
    ],
)
def test_the_rate_falls_with_the_size_and_is_higher_for_adapters(parameters, full, adapters):
    assert default_rate(parameters, lora=False) == full
    assert default_rate(parameters, lora=True) == adapters


def test_the_rate_follows_what_is_trained_and_is_said(toy, heard):
    display, text = heard
    plain = with_defaults(_settings(toy), display)
    assert plain.settings.train.lr == 5e-4
    assert plain.provenance["train.lr"] == "default for all weights of 0.042 M parameters"
    adapted = with_defaults(_settings(toy, **{"student.lora": {"r": 2}}), display)
    assert adapted.settings.train.lr == 1e-3
    assert re.search(r"learning rate: 0.001, the default for adapters on 0\.04\d M parameters \(train.lr\)", text())


def test_a_rate_of_the_user_or_the_loss_wins(toy, heard):
    display, text = heard
    assert with_defaults(_settings(toy, **{"train.lr": 0.25}), display).settings.train.lr == 0.25
    assert with_defaults(_settings(toy, loss="minillm"), display).settings.train.lr == 5e-6
    assert "learning rate" not in text()


def test_a_chosen_rate_is_checked_against_the_others(toy, heard):
    with pytest.raises(SettingsError, match=r"train.*min_lr \(0\.01\) must not be above lr \(0\.0005\)"):
        with_defaults(_settings(toy, **{"train.min_lr": 0.01}), heard[0])


def test_the_rate_is_in_the_plan_and_in_the_runs_settings(toy, tmp_path, quiet):
    settings = _settings(toy, **{"student.lora": {"r": 2}, "output": str(tmp_path / "run")})
    optimizer = dict(make_plan(settings, Display(quiet)).sections["training"])["optimizer"]
    assert "lr 0.001 " in optimizer
    folder = run.train(settings, console=quiet)
    assert re.search(r"lr: 0.001  # default for adapters on 0\.04\d M parameters", folder.config.read_text())


def test_a_small_teacher_and_a_small_machine_are_warned_of(toy, heard, monkeypatch):
    display, text = heard
    with_defaults(_settings(toy), display)
    assert "warning" not in text()
    monkeypatch.setattr(defaults, "memory_of", lambda device: 1000)
    with_defaults(
        _settings(toy, **{"teacher.model": str(toy / "gpt2"), "student.model": str(toy / "teacher")}), display
    )
    said = text()
    assert re.search(r"the teacher \(0\.042 M parameters\) is smaller than the student \(\d.*M\)", said)
    assert "weights, gradients and optimizer state need at least" in said


@pytest.mark.parametrize("processes", [1, 4])
def test_the_need_for_memory_is_counted(toy, monkeypatch, processes):
    """By hand: float32 weights, gradients and two moments of the student, and the teacher as it is stored."""
    from transformers import AutoModelForCausalLM

    sizes = [
        sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(toy / name).parameters())
        for name in ("gpt2", "teacher")
    ]
    settings = _settings(toy)
    teacher = defaults.make_teacher(settings.settings.teacher, settings.registry, settings.in_memory)
    config = defaults.student_config(settings.settings.student, None)
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    found = defaults._least_bytes(settings.settings, config, teacher, torch.device("cpu"))
    assert found == 16 * sizes[0] / processes + 4 * sizes[1]  # sharded; the teacher is whole


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_an_error_before_anything_is_read(toy):
    settings = _settings(toy, **{"train.device": "cuda", "data.path": "nowhere.jsonl"})
    for start in (run.train, lambda settings: dry_run(settings, console=Console(quiet=True))):
        with pytest.raises(DpkdError, match=r"train\.device: cuda is asked for, and PyTorch"):
            start(settings)


def test_the_start_names_device_memory_and_precision(toy, tmp_path):
    out = io.StringIO()
    run.train(_settings(toy, output=str(tmp_path / "run")), console=Console(file=out, width=200))
    first = out.getvalue().splitlines()[0]
    gib = devices.memory_of(torch.device("cpu")) / 2**30
    assert first == f"device: cpu, {gib:.1f} GiB of memory, fp32 (train.device, train.precision)"


def test_adapters_do_not_make_a_student_larger_than_its_teacher(toy, heard):
    display, text = heard
    with_defaults(_settings(toy, **{"student.model": str(toy / "teacher"), "student.lora": {"r": 64}}), display)
    said = text()
    assert "for adapters" in said
    assert "smaller than the student" not in said
