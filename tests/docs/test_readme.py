"""What the README says is generated, or is checked against the code."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import generate
import pytest
from typer.main import get_command

from dpkd.cli.main import app

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_generated_parts_are_fresh():
    assert generate.generated(README) == README, "run: python docs/generate.py"
    assert README.count("<!-- generated:") == 1


COMMANDS = [
    shlex.split(line, comments=True) for line in "\n".join(blocks("bash")).splitlines() if line.startswith("dpkd ")
]


def test_there_are_commands():
    assert len(COMMANDS) > 8


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_and_flag_exists(command):
    group = get_command(app)
    words = command[1:]
    while words and not words[0].startswith("-") and words[0] in getattr(group, "commands", {}):
        group = group.commands[words.pop(0)]
    flags = {name for parameter in group.params for name in parameter.opts}
    assert not hasattr(group, "commands"), f"no such command: {command}"
    assert {word for word in words if word.startswith("--")} <= flags


def test_the_file_tree_is_the_tree():
    tree = re.search(r"```\n(pyproject\.toml .*?)```", README, flags=re.DOTALL)[1]
    named, parent = set(), ""
    for line in tree.splitlines():
        name = line.split()[0]
        parent = name if not line.startswith(" ") else parent
        path = name if not line.startswith(" ") else f"{parent}{name}"
        assert (ROOT / path).exists(), path
        assert len(line.split(maxsplit=1)) == 2, f"{path} has no comment"
        named.add(path.rstrip("/"))
    there = {f"dpkd/{p.name}" for p in (ROOT / "dpkd").iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert there - {"dpkd/__init__.py"} <= named


def test_links_lead_somewhere():
    links = re.findall(r"\]\((?!http)([^)]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link.partition("#")[0]).exists()] == []
