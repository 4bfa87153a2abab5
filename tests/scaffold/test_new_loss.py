"""`dpkd new-loss`: a package of each kind that works as it is, under the author's names."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dpkd.api import Family
from dpkd.cli.main import app
from dpkd.errors import SettingsError
from dpkd.scaffold import KINDS, names_of, rendered, write_package
from dpkd.testing import NonConforming, check_loss

EXAMPLE = Path(__file__).parents[2] / "docs/examples/dpkd-hello"
NAMES = names_of("tail-kl2", {})
WRONG = {  # a small mistake in each formula
    "token": ("0.5 * (p - q)", "0.6 * (p - q)"),
    "pair": ("(gap_t - gap_s)", "(gap_s - gap_t)"),
    "rollout": ("-x.advantages * ratio", "-x.advantages * ratio.square()"),
}


def test_the_example_package_is_the_token_skeleton():
    files = {path.name: path.read_text(encoding="utf-8") for path in EXAMPLE.glob("*.*")}
    assert files == rendered(names_of("hello", {}), "token"), "run: python docs/generate.py"


def test_the_names_are_the_authors():
    assert NAMES.as_dict() == {
        "name": "tail-kl2",
        "package": "dpkd-tail-kl2",
        "module": "dpkd_tail_kl2",
        "test": "test_tail_kl2",
        "Class": "TailKl2",
    }
    assert names_of("dpkd-exo", {}).package == "dpkd-exo"


@pytest.mark.parametrize("kind", KINDS)
def test_its_files(kind):
    texts = rendered(NAMES, kind)
    assert set(texts) == {"pyproject.toml", "README.md", "dpkd_tail_kl2.py", "test_tail_kl2.py"}
    everything = "\n".join(texts.values())
    assert "$" not in everything
    assert "hello" not in everything.lower()
    assert max(map(len, everything.splitlines())) <= 120
    package = tomllib.loads(texts["pyproject.toml"])
    assert package["project"]["name"] == "dpkd-tail-kl2"
    assert package["project"]["entry-points"] == {"dpkd": {"tail-kl2": "dpkd_tail_kl2"}}
    assert package["tool"]["setuptools"]["py-modules"] == ["dpkd_tail_kl2"]


@pytest.mark.parametrize("kind", KINDS)
def test_its_tests_are_green_at_once(kind, tmp_path):
    done = CliRunner().invoke(app, ["new-loss", "tail-kl2", "--kind", kind, "--output", str(tmp_path / "it")])
    assert done.exit_code == 0, done.output
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider"],
        capture_output=True,
        text=True,
        cwd=tmp_path / "it",
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert run.returncode == 0, run.stdout
    outcomes = dict(re.findall(r"::(\S+) (PASSED|FAILED|SKIPPED|ERROR)", run.stdout))
    assert len(outcomes) > 20
    assert outcomes["test_it_conforms[tail-kl2-matches_reference]"] == "PASSED"


@pytest.fixture
def modules(request, tmp_path, monkeypatch):
    """Loss module and test module of a package, imported; with the mistake in it where `wrong`."""
    kind, wrong = request.param
    names = names_of(f"{kind}-{'wrong' if wrong else 'right'}", {})
    write_package(names, kind, tmp_path)
    if wrong:
        file = tmp_path / f"{names.module}.py"
        source = file.read_text(encoding="utf-8")
        assert source.count(WRONG[kind][0]) == 1
        file.write_text(source.replace(*WRONG[kind]), encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    yield kind, import_module(names.module), import_module(names.test)
    for name in (names.module, names.test):
        del sys.modules[name]


@pytest.mark.parametrize("modules", [(kind, False) for kind in KINDS], indirect=True, ids=KINDS)
def test_the_loss_is_of_its_kind_and_conforms(modules):
    kind, loss, test = modules
    assert loss.SPEC.family is Family(kind)
    assert loss.dpkd_losses() == [loss.SPEC]
    assert check_loss(loss.SPEC, reference=test.reference).ok


@pytest.mark.parametrize("modules", [(kind, True) for kind in KINDS], indirect=True, ids=KINDS)
def test_its_reference_finds_a_mistake(modules):
    _, loss, test = modules
    with pytest.raises(NonConforming, match="matches_reference"):
        check_loss(loss.SPEC, reference=test.reference)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("My_Loss", "did you mean my-loss?"),
        ("TailKL", "did you mean tail-kl?"),
        ("2kl", "did you mean kl?"),
        ("a--b", "did you mean a-b?"),
        ("", "lower-case letters"),
        ("kd", "a loss of this name is installed, from dpkd 0.1"),
        ("token", "a class of dpkd.api has this name"),
        ("zoo", "dpkd's own modules have this name"),
    ],
)
def test_a_name_that_cannot_be(name, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    error = CliRunner().invoke(app, ["new-loss", name]).exception
    assert isinstance(error, SettingsError)
    assert says in str(error)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_kind_and_a_folder_in_use(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    error = CliRunner().invoke(app, ["new-loss", "mine", "--kind", "tokens"]).exception
    assert str(error) == "--kind tokens: should be token, pair or rollout"
    (tmp_path / "dpkd-mine").mkdir()
    (tmp_path / "dpkd-mine/notes.txt").write_text("keep", encoding="utf-8")
    error = CliRunner().invoke(app, ["new-loss", "mine"]).exception
    assert "dpkd-mine exists and is not empty" in str(error)
    assert [path.name for path in (tmp_path / "dpkd-mine").iterdir()] == ["notes.txt"]
    (tmp_path / "file").touch()
    with pytest.raises(SettingsError, match="cannot write into"):
        write_package(NAMES, "token", tmp_path / "file" / "folder")
