"""What the pages of docs/ name exists: functions, settings, metrics, losses, commands, files."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest
from typer.main import get_command

from dpkd.api import SourceSpec
from dpkd.cli.main import app
from dpkd.config.problems import all_paths
from dpkd.config.settings import RunSettings
from dpkd.plugins import load_registry

ROOT = Path(__file__).parents[2]
PAGES = {
    name: (ROOT / f"docs/{name}.md").read_text(encoding="utf-8")
    for name in ("life-of-a-batch", "footguns", "hooks", "write-a-loss", "zoo", "concepts", "cookbook")
}
EVERYTHING = "\n".join(PAGES.values())
CODE = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", EVERYTHING, flags=re.DOTALL | re.MULTILINE))


@cache
def defined(file: str) -> frozenset[str]:
    """Functions and classes of a module, and methods as `Class.method`."""
    names = set()
    for node in ast.parse((ROOT / file).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
    return frozenset(names)


PLACES = re.findall(r"`([\w/]+\.py)::([\w.]+)`", PAGES["life-of-a-batch"])


def test_the_life_of_a_batch_names_functions():
    assert len(PLACES) > 30
    assert PAGES["life-of-a-batch"].count("::") == len(PLACES)


@pytest.mark.parametrize(("file", "name"), sorted(set(PLACES)))
def test_every_function_exists(file, name):
    assert name in defined(file)


def test_the_loop_calls_its_stages_in_the_order_of_the_page():
    page = PAGES["life-of-a-batch"]
    methods = (ROOT / "dpkd/train/trainer.py").read_text(encoding="utf-8")
    step = methods[methods.index("def _step(") :]
    assert_in_order(step, "source.next(step)", "self.builder.step_batches(", "self.train_step(")
    loop = methods[methods.index("def run(") : methods.index("def _step(")]
    assert_in_order(loop, "self._stoppable_step(", "self._log(self._done", "callback.on_step(", "self.save(self._done")
    stages = ("SourceBase.next", "StepBatchBuilder.step_batches", "TrainStep", "MetricsLog", "Callback.on_step")
    assert_in_order(page, *(f"::{stage}`" for stage in (*stages, "save")))


def assert_in_order(text: str, *parts: str) -> None:
    places = [text.index(part) for part in parts]
    assert places == sorted(places)


def test_every_setting_exists():
    own = [
        path for source in load_registry({}).all(SourceSpec).values() for path in all_paths(source.spec.config, "text.")
    ]
    known = {*all_paths(RunSettings), *RunSettings.model_fields, *own}
    blocks = "|".join(name for name in RunSettings.model_fields if name not in ("output", "seed"))
    named = {m[1] for code in CODE if (m := re.fullmatch(rf"((?:{blocks})\.[a-z_.0-9]+)(?:=.*)?", code))}
    assert len(named) > 8
    assert named <= known


def test_every_metric_is_documented():
    metrics = (ROOT / "docs/metrics.md").read_text(encoding="utf-8")
    named = {code for code in CODE if re.fullmatch(r"(loss|text|kl|nll|reward|logp|agreement)/\w+", code)}
    assert len(named) > 4
    assert [name for name in named if f"`{name}`" not in metrics] == []


def test_every_loss_and_its_settings_exist():
    losses = {name: loss for name, loss in load_registry({}).losses.items() if loss.distribution == "dpkd"}
    named = {code for code in CODE if re.fullmatch(r"dpkd(-[a-z]+)?|kd|minillm|seqkd|sft", code)} - {"dpkd-hello"}
    assert len(named) > 4
    assert named <= set(losses)
    assert {"temperature", "scale_by_t2"} <= set(losses["kd"].spec.config.model_fields)
    for name in ("dpkd", "dpkd-ipo"):
        assert "aggregation" in losses[name].spec.config.model_fields
        assert losses[name].spec.suggests["terms"]["lm"]["weight"] == 1
    assert losses["dpkd"].spec.suggests["text"]["refresh"] == "every_step"


def test_every_command_exists():
    commands = set(get_command(app).commands)
    named = {code.split()[1] for code in CODE if code.startswith("dpkd ")}
    assert len(named) > 3
    assert named <= commands


def test_every_link_leads_somewhere():
    links = re.findall(r"\]\((?!http)([^)]+)\)", EVERYTHING)
    assert len(links) > 5
    files = {link.partition("#")[0] for link in links}  # the site is built strictly: it looks for the anchors
    assert [file for file in files if not (ROOT / "docs" / file).exists()] == []


def test_the_readme_links_the_pages():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [name for name in PAGES if f"](docs/{name}.md)" not in readme] == []
