"""Every command of the cookbook and of the quick start parses, and its settings resolve."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from dpkd.cli.main import app
from dpkd.config.layers import user_layers
from dpkd.config.resolve import resolve
from dpkd.plugins import load_registry

DOCS = Path(__file__).parents[2] / "docs"
BLOCKS = "".join(
    "".join(re.findall(r"```bash\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), flags=re.DOTALL))
    for page in ("cookbook.md", "index.md")
)
LAUNCHED = re.compile(r"^accelerate launch .* -m dpkd\.cli\.main ")  # the same command line, in several processes
COMMANDS = [shlex.split(LAUNCHED.sub("dpkd ", line)) for line in BLOCKS.replace("\\\n", " ").splitlines()]
FLAGS = {
    "loss": "loss.name",
    "teacher": "teacher.model",
    "student": "student.model",
    "data": "data.path",
    "output": "output",
    "seed": "seed",
}


def parsed(words):
    """The command, its words, and its parameters, as the real command line reads them."""
    command, context, rest, path = get_command(app), None, words[1:], []
    while hasattr(command, "commands"):
        path.append(rest[0])
        command, rest = command.commands[rest[0]], rest[1:]
    context = command.make_context(words[0], list(rest))
    return " ".join(path), context.params


def test_there_are_recipes():
    recipes = re.findall(r"^## ", (DOCS / "cookbook.md").read_text(encoding="utf-8"), flags=re.M)
    assert 5 <= len(recipes) <= 12
    assert len(COMMANDS) > 15
    assert {words[0] for words in COMMANDS} == {"dpkd"}


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_it_parses_and_resolves(words, monkeypatch):
    monkeypatch.setattr("dpkd.rollout.backends.vllm.find_spec", lambda name: object())  # as if vLLM were there
    command, given = parsed(words)
    if command not in ("train", "config show") or given.get("resume"):
        return
    flags = {f"--{name}": (path, given[name]) for name, path in FLAGS.items()}
    done = resolve(user_layers(given["config"] or [], flags, given["set_"] or []), load_registry())
    assert done.main.spec.name == given["loss"]


def test_a_mistake_would_be_noticed():
    with pytest.raises(Exception, match="No such option: --los"):
        parsed(["dpkd", "train", "--los", "kd"])
