"""A stranger's package: installed beside dpkd with pip, found, trained with, and explained when misused."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "docs/examples/dpkd-hello"


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The example, copied, built and installed into a folder of its own, without network."""
    folder = tmp_path_factory.mktemp("stranger")
    shutil.copytree(EXAMPLE, folder / "package", ignore=shutil.ignore_patterns("build", "*.egg-info"))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    done = subprocess.run(
        [*pip, "--target", str(folder / "site"), str(folder / "package")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return folder / "site"


def dpkd(site: Path, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(site), "COLUMNS": "120"}
    return subprocess.run(
        [sys.executable, "-m", "dpkd.cli.main", *arguments], capture_output=True, text=True, env=environment, cwd=cwd
    )


def test_its_loss_is_listed_described_and_trains(site, toy, tmp_path):
    assert "hello" in dpkd(site, "list-losses", cwd=tmp_path).stdout
    card = dpkd(site, "describe-loss", "hello", cwd=tmp_path).stdout
    assert "dpkd-hello 0.1.0" in card
    settings = ["student.init=layers", "student.layers=2", "train.steps=2", "train.device=cpu", "loss.power=2"]
    done = dpkd(
        site,
        "train",
        "--loss",
        "hello",
        "--teacher",
        str(toy / "teacher"),
        "--data",
        str(toy / "data.jsonl"),
        "--output",
        "run",
        *(x for s in settings for x in ("--set", s)),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run/model/model.safetensors").is_file()


def test_a_typo_in_its_settings_is_explained(site, toy, tmp_path):
    done = dpkd(
        site,
        "train",
        "--loss",
        "hello",
        "--teacher",
        str(toy / "teacher"),
        "--student",
        str(toy / "gpt2"),
        "--set",
        "loss.powr=2",
        cwd=tmp_path,
    )
    assert done.returncode == 2
    assert "loss.powr: no such setting (from --set); did you mean loss.power?" in done.stderr
    assert "Traceback" not in done.stderr
