"""The tutorial's blocks are the example's files, and its commands exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from dpkd.cli.main import app

DOCS = Path(__file__).parents[2] / "docs"
EXAMPLE = DOCS / "examples/dpkd-hello"
TUTORIAL = (DOCS / "write-a-loss.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", TUTORIAL, flags=re.DOTALL | re.MULTILINE)


def written(file: str, pieces: list[str]) -> str:
    """The pieces that are in a file, put together, without blank lines."""
    text = (EXAMPLE / file).read_text(encoding="utf-8")
    return squeezed("".join(piece for piece in pieces if piece in text))


def squeezed(text: str) -> str:
    return "\n".join(line for line in text.splitlines() if line.strip())


@pytest.mark.parametrize(
    ("file", "language"), [("dpkd_hello.py", "python"), ("test_hello.py", "python"), ("pyproject.toml", "toml")]
)
def test_the_blocks_make_up_the_file(file, language):
    assert written(file, blocks(language)) == squeezed((EXAMPLE / file).read_text(encoding="utf-8"))


def test_every_code_block_is_a_piece_of_the_example():
    files = [path.read_text(encoding="utf-8") for path in EXAMPLE.glob("*.*")]
    pieces = blocks("python") + blocks("toml")
    assert len(pieces) > 5
    assert [piece for piece in pieces if not any(piece in text for text in files)] == []


LINES = [shlex.split(line, comments=True) for line in "".join(blocks("bash")).splitlines()]
COMMANDS = [words for words in LINES if words[0] == "dpkd"]


def test_there_are_commands():
    assert len(COMMANDS) > 6
    assert {words[0] for words in LINES} == {"dpkd", "cd", "python"}
    modules = {words[2] for words in LINES if words[0] == "python"}
    assert modules == {"pip", "pytest", "build", "twine"}


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_and_flag_exists(words):
    command = get_command(app).commands[words[1]]
    flags = {name for parameter in command.params for name in parameter.opts if name.startswith("--")}
    assert {word for word in words if word.startswith("--")} <= flags
    takes_a_name = any(parameter.param_type_name == "argument" for parameter in command.params)
    assert takes_a_name or words[2:3] == [] or words[2].startswith("--")


def test_the_checks_that_it_names_exist():
    from dpkd.testing import ALL_CHECKS

    assert "`matches_reference`" in TUTORIAL
    assert "matches_reference" in {check.name for check in ALL_CHECKS}
