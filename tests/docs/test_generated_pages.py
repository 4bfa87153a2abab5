"""Generated pages are as the code would write them now, and say all that the code says."""

from __future__ import annotations

import importlib
import re

import cards
import generate
import pytest
import reference
from typer.main import get_command

from dpkd.cli.main import app
from dpkd.config.problems import all_paths
from dpkd.config.settings import RunSettings
from dpkd.plugins import load_registry

LOSSES = {name: loss.spec for name, loss in load_registry({}).losses.items() if loss.distribution == "dpkd"}
PAGES = reference.pages()
ZOO = (generate.ROOT / "docs/zoo.md").read_text(encoding="utf-8")


def test_the_files_are_fresh():
    assert generate.stale() == set(), "run: python docs/generate.py"


def test_a_stale_file_is_noticed(monkeypatch):
    monkeypatch.setattr(cards, "pages", lambda: {"kd": "another text"})
    stale = {path.stem for path in generate.stale()}
    assert {"kd", "rkl"} <= stale  # a card that changed, and one of a loss that is no more


def test_the_readme_counts_the_losses():
    text = (generate.ROOT / "README.md").read_text(encoding="utf-8")
    counts = re.findall(r"(?:any of|all) (\d+) losses|distillation losses \| (\d+),", text)
    assert [int(a or b) for a, b in counts] == [len(LOSSES)] * 3


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_a_card_says_what_the_spec_says(name):
    spec, page = LOSSES[name], cards.pages()[name]
    assert page.startswith(f"# {name}: {spec.card.title}\n")
    assert f"```math\n{spec.card.latex}\n```" in page
    assert spec.card.unconfirmed == "" or f"**Not confirmed:** {cards.escaped(spec.card.unconfirmed)}" in page
    assert spec.preset_of == "" or f"| preset of | [`{spec.preset_of}`]({spec.preset_of}.md) |" in page
    for field, info in spec.config.model_fields.items():
        meaning = re.escape(cards.escaped(info.description).replace("|", "\\|"))
        assert re.search(rf"^\| `{field}` \| `.+` \| .+ \| {meaning} \|", page, flags=re.M)
    assert all(source.url in page for source in spec.card.sources)
    assert f"](losses/{name}.md)" in ZOO
    assert re.search(rf"^\| family \| \[{spec.family.value}\]", page, flags=re.M)


def test_the_decision_table_names_losses():
    table = ZOO.split("## I have X")[1].split("\n## ")[0]
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| ")][1:]
    answers = [row[1].strip("`") for row in rows]
    assert len(answers) > 10
    assert set(answers) - {"any"} <= set(LOSSES)
    named = set(re.findall(r"`([a-z0-9-]+)`", table)) - {"t", "label_smoothing"}
    assert len(named) > 15
    assert named <= set(LOSSES)


def test_what_is_left_out_is_not_there():
    rows = re.findall(r"^\| ([^|]+) \| [^|]+ \|$", ZOO.split("## Left out")[1], flags=re.M)[1:]
    assert len(rows) > 3
    words = {word.lower() for row in rows for word in re.findall(r"[A-Z][\w-]+", row)}
    assert not {name for name in LOSSES if name in words - {"distillm"}}


def test_the_command_reference_has_every_command_and_flag():
    def walk(command, words):
        yield words, {name for parameter in command.params for name in parameter.opts if name.startswith("--")}
        for name, sub in getattr(command, "commands", {}).items():
            yield from walk(sub, [*words, name])

    found = list(walk(get_command(app), ["dpkd"]))
    assert len(found) > 10
    for words, flags in found:
        section = PAGES["cli"].split(f"## {' '.join(words)}\n" if len(words) > 1 else "# Command line\n")[1]
        section = section.split("\n## ")[0]
        assert {flag for flag in flags if flag not in section} == set()


def test_the_settings_reference_has_every_setting():
    fixed = {path for path in all_paths(RunSettings) if not path.startswith("loss.")}
    told = {path.replace(".NAME", "") for path in re.findall(r"^\| `([\w.]+)` \|", PAGES["settings"], flags=re.M)}
    assert len(told) > 60
    blocks = {path for path in fixed if any(other.startswith(f"{path}.") for other in fixed)}
    assert fixed - told - blocks == set()


@pytest.mark.parametrize("module", reference.MODULES)
def test_the_python_reference_has_every_public_name(module):
    names = [name for name in reference.public_names(importlib.import_module(module)) if name != "__version__"]
    assert names
    assert [name for name in names if f"### `{module}.{name}`" not in PAGES["api"]] == []


def test_signatures_are_as_written():
    assert "kl(log_p_NV: Tensor, log_q_NV: Tensor) -> Tensor" in PAGES["api"]
    assert "    *,\n    loss: Loss,\n    teacher: " in PAGES["api"]
    assert "\n- `TOKEN` = `'token'`\n" in PAGES["api"]
    assert (
        "```python\n>>> log_softmax(torch.zeros(1, 4)).exp()\ntensor([[0.2500, 0.2500, 0.2500, 0.2500]])\n```"
        in PAGES["api"]
    )
