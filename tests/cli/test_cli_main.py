"""The frame of the command line: help is light, mistakes are sentences, exit codes are kept."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from typer.testing import CliRunner

from dpkd import __version__
from dpkd.cli.main import app, main
from dpkd.errors import DpkdError, SettingsError

# typer itself imports pydantic when a command has options.
HEAVY = ("torch", "transformers", "datasets", "accelerate", "yaml", "numpy", "dpkd.api")


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Exit code of the console script's function."""
    monkeypatch.setattr(sys, "argv", ["dpkd", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    return int(caught.value.code or 0)


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["config", "--help"], ["--version"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom dpkd.cli.main import app\n"
        f"try: app({arguments})\nexcept SystemExit: pass\n"
        f"print([m for m in {HEAVY} if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.splitlines()[-1] == "[]"


def test_every_command_and_option_says_what_it_does() -> None:
    from typer.main import get_command

    commands: dict[str, Any] = dict(get_command(app).commands)  # type: ignore[attr-defined]
    commands |= {f"config {name}": command for name, command in commands.pop("config").commands.items()}
    assert {"train", "eval", "list-losses", "describe-loss", "check-loss", "config show"} <= commands.keys()
    silent = [name for name, command in commands.items() if not command.help]
    silent += [
        f"{name} {parameter.name}"
        for name, command in commands.items()
        for parameter in command.params
        if not getattr(parameter, "help", "x")
    ]
    assert silent == []


def test_version() -> None:
    assert CliRunner().invoke(app, ["--version"]).output == f"dpkd {__version__}\n"


def test_a_mistake_is_a_sentence_and_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("DPKD_DEBUG", raising=False)
    assert call(monkeypatch, "describe-loss", "kdd") == SettingsError.exit_code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "no loss is called 'kdd'; did you mean kd" in printed.err
    assert "Traceback" not in printed.err


def test_all_mistakes_are_printed_a_line_each(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "train", "--loss", "kd", "--set", "train.lrr=1") == SettingsError.exit_code == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in lines] == ["train.lrr", "teacher.model", "student.model"]


def test_dpkd_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DPKD_DEBUG", "1")
    monkeypatch.setattr(sys, "argv", ["dpkd", "describe-loss", "kdd"])
    with pytest.raises(DpkdError):
        main()


def test_traceback_shows_it_wherever_the_flag_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["dpkd", "describe-loss", "kdd", "--traceback"])
    with pytest.raises(DpkdError):
        main()


class _Unshowable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no")


@pytest.mark.parametrize("error", [_Unshowable(), KeyError("x"), GeneratorExit(), RecursionError("deep")])
def test_the_unforeseen_is_a_sentence_with_a_file_to_report(
    error: BaseException, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("dpkd.plugins.load_registry", fail)
    assert call(monkeypatch, "list-losses") == 1
    (file,) = tmp_path.iterdir()
    printed = capsys.readouterr().err
    assert type(error).__name__ in printed
    assert str(file) in printed
    assert "Traceback" not in printed
    assert "test_cli_main.py" in file.read_text()


def test_exit_in_a_plugin_is_not_success(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("dpkd.plugins.load_registry", lambda: sys.exit(0))
    assert call(monkeypatch, "list-losses") == 1
    assert "sys.exit(0)" in capsys.readouterr().err


def test_interrupted(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dpkd.plugins.load_registry", interrupt)
    assert call(monkeypatch, "list-losses") == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_an_unknown_command_is_a_usage_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "trian") == 2
    assert "No such command 'trian'" in capsys.readouterr().err


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """Stands in for the engine: what was called, with what."""
    calls: list[tuple[str, Any]] = []

    def stand_in(module: str, **names: str) -> None:
        fake = ModuleType(module)
        for name, label in names.items():
            setattr(fake, name, lambda given, label=label, **_: calls.append((label, given)))
        monkeypatch.setitem(sys.modules, module, fake)

    stand_in("dpkd.train.run", train="train")
    stand_in("dpkd.train.resume", resume_folder="resume")
    stand_in("dpkd.train.plan", dry_run="dry run")
    return calls


def test_train_hands_over_files_flags_and_sets_in_order(engine: list[tuple[str, Any]], tmp_path: Path) -> None:
    base, more = tmp_path / "base.yaml", tmp_path / "more.yaml"
    base.write_text("loss: {name: kd, kd_ratio: 0.1}\nteacher: t\nseed: 1\ntrain: {lr: 1.0e-3, steps: 3}\n")
    more.write_text("train: {lr: 2.0e-3}\n")
    flags = ["--student", "s", "--data", "d.jsonl", "--output", "o", "--seed", "7"]
    files = ["--config", str(base), "--config", str(more)]
    result = CliRunner().invoke(app, ["train", *files, *flags, "--set", "train.steps=4", "--set", "loss.kd_ratio=1"])
    assert result.exit_code == 0, result.output
    ((name, resolved),) = engine
    assert name == "train"
    settings = resolved.settings
    assert (settings.teacher.model, settings.student.model, settings.data.path) == ("t", "s", "d.jsonl")
    assert (settings.train.lr, settings.train.steps, settings.seed, settings.output) == (2e-3, 4, 7, "o")
    assert resolved.main.config.kd_ratio == 1.0
    assert resolved.provenance["seed"] == "--seed"
    assert resolved.provenance["train.lr"] == str(more)


def test_dry_run_trains_nothing(engine: list[tuple[str, Any]]) -> None:
    arguments = ["train", "--loss", "sft", "--student", "s", "--dry-run"]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert [name for name, _ in engine] == ["dry run"]


def test_resume_takes_no_other_settings(engine: list[tuple[str, Any]], tmp_path: Path) -> None:
    assert CliRunner().invoke(app, ["train", "--resume", str(tmp_path)]).exit_code == 0
    assert engine == [("resume", tmp_path)]
    result = CliRunner().invoke(app, ["train", "--resume", str(tmp_path), "--seed", "1", "--set", "seed=2"])
    assert isinstance(result.exception, SettingsError)
    assert "remove --seed" in str(result.exception)
    assert len(engine) == 1


def test_config_show_prints_what_train_would_use() -> None:
    arguments = ["config", "show", "--loss", "kd", "--teacher", "t", "--student", "s", "--set", "loss.kd_ratio=0.25"]
    printed = CliRunner().invoke(app, arguments).output.splitlines()
    assert printed[1:4] == ["loss:", "  name: kd  # --loss", "  kd_ratio: 0.25  # --set"]


def test_a_strangers_loss_is_one_install_away(install_plugin: Any, loss_source: Callable[[str], str]) -> None:
    """In another process, through nothing but the folder that an installer would have written."""
    site = install_plugin("stranger", {"curved": loss_source("curved")})

    def dpkd(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", "from dpkd.cli.main import main; main()", *arguments]
        environment = {"PYTHONPATH": str(site), "PATH": "", "COLUMNS": "100", "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)

    listed = dpkd("list-losses")
    assert listed.returncode == 0, listed.stderr
    assert any(line.split()[:2] == ["curved", "token"] for line in listed.stdout.splitlines())
    wrong = dpkd("train", "--loss", "curved", "--teacher", "t", "--student", "s", "--set", "loss.strenght=0.1")
    assert wrong.returncode == 2
    assert wrong.stderr == "loss.strenght: no such setting (from --set); did you mean loss.strength?\n"


def test_progress_without_a_terminal_is_a_line_every_half_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    from io import StringIO

    from rich.console import Console

    from dpkd.cli import progress

    seconds = iter([0.0, 10.0, 30.0, 40.0, 61.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(seconds))
    said = StringIO()
    with progress.shown(Console(file=said, width=80)) as tell:
        for done in (1, 2, 3, 4000):
            tell("answers", done, 5000)
    assert said.getvalue().splitlines() == ["answers: 2 of 5,000 after 30 s", "answers: 4,000 of 5,000 after 61 s"]
