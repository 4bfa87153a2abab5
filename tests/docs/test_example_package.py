"""The example package keeps its own promises: its test passes, and a mistake in its loss fails it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "docs/examples/dpkd-hello"


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of the example that looks installed, away from this project's settings of pytest."""
    folder = tmp_path / "dpkd-hello"
    shutil.copytree(EXAMPLE, folder, ignore=shutil.ignore_patterns("build", "*.egg-info", "__pycache__", ".*"))
    info = folder / "dpkd_hello-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: dpkd-hello\nVersion: 0.1.0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text("[dpkd]\nhello = dpkd_hello\n", encoding="utf-8")
    return folder


def run(package: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(package), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [sys.executable, "-m", *arguments], capture_output=True, text=True, env=environment, cwd=package
    )


def outcomes(package: Path) -> dict[str, str]:
    """Test id → PASSED, FAILED or SKIPPED."""
    output = run(package, "pytest", "-v", "-p", "no:cacheprovider", "test_hello.py").stdout
    return dict(re.findall(r"test_hello\.py::(\S+) (PASSED|FAILED|SKIPPED|ERROR)", output))


def test_its_test_passes(package):
    found = outcomes(package)
    assert len(found) > 30
    assert not {"FAILED", "ERROR"} & set(found.values()), found
    assert {"test_it_conforms[hello-weights_train]", "test_it_conforms[hello-kl_sum_says_the_same]"} == {
        name for name, outcome in found.items() if outcome == "SKIPPED" and name.startswith("test_it_conforms[")
    }
    assert found["test_it_conforms[hello-matches_reference]"] == "PASSED"


def test_its_test_finds_a_wrong_constant(package):
    module = package / "dpkd_hello.py"
    source = module.read_text(encoding="utf-8")
    assert source.count("0.5 * (p - q)") == 1
    module.write_text(source.replace("0.5 * (p - q)", "0.6 * (p - q)"), encoding="utf-8")
    failed = {name for name, outcome in outcomes(package).items() if outcome == "FAILED"}
    assert failed == {
        "test_it_conforms[hello-matches_reference]",
        "test_it_conforms_with_squared_gaps[hello-matches_reference]",
    }


def test_the_command_finds_nothing_wrong(package):
    done = run(package, "dpkd.cli.main", "check-loss", "hello")
    assert done.returncode == 0, done.stdout
    assert re.search(r"hello: \d+ passed, 2 skipped, 1 warned", done.stdout)
    assert "FAILED" not in done.stdout
