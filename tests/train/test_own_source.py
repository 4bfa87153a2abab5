"""A run on responses of a stranger's source: trained, interrupted and continued; and who must not know its name."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
from toy_runs import assert_same_model

from dpkd.api import SourceSpec
from dpkd.errors import SettingsError
from dpkd.plugins import load_registry
from dpkd.run_metrics import read_metrics
from dpkd.train import run
from dpkd.train.plan import make_plan
from dpkd.train.progress import Display
from dpkd.train.resume import resume_folder

ROOT = Path(__file__).parents[2]
EXAMPLE = (ROOT / "docs/examples/dpkd-best-of-n/dpkd_best_of_n.py").read_text(encoding="utf-8")
OWN = {"text.source": "best-of-n", "text.num_generations": 3, "text.refresh": "every_n_steps", "text.every": 2}


def test_a_strangers_source_is_planned_trained_and_resumed(install_plugin, settings_of, quiet, stops, tmp_path):
    install_plugin("stranger", {"source.best-of-n": EXAMPLE})
    changes = {**OWN, "train.steps": 4}
    rows = dict(make_plan(settings_of("rkl", changes), Display(quiet)).sections["text"])
    assert rows["student writes"].startswith("every_n_steps: 48 responses in 2 collections")
    whole = run.train(settings_of("rkl", changes), console=quiet)
    assert [line["text/responses"] for line in read_metrics(whole.metrics)] == [4.0] * 4
    with stops():
        run.train(settings_of("rkl", changes | {"output": str(tmp_path / "stopped")}), console=quiet)
    continued = resume_folder(tmp_path / "stopped", console=quiet)
    assert_same_model(whole, continued)


def test_its_settings_are_its_own(install_plugin, settings_of):
    install_plugin("stranger", {"source.best-of-n": EXAMPLE})
    with pytest.raises(SettingsError, match=r"text\.mix: the source best-of-n has no such setting \(mixed has it\)"):
        settings_of("rkl", {**OWN, "text.mix": {"student": 1.0}})
    with pytest.raises(SettingsError, match=r"text\.num_generations: should be greater than or equal to 2"):
        settings_of("rkl", {**OWN, "text.num_generations": 1})
    student = {"student.init": "pretrained", "student.layers": None, "student.model": "small"}
    with pytest.raises(SettingsError, match=r"text\.source has the teacher score the student's responses"):
        settings_of("sft", {**OWN, **student}, teacher=None)


NAMES = frozenset(load_registry({}).all(SourceSpec))
CLASSES = {f"{name.title()}{kind}" for name in NAMES for kind in ("Source", "Config")} - {"DatasetConfig"}


def compared_with_a_name(tree: ast.AST) -> list[int]:
    """Lines that compare `….source` (or anything named source) with the name of a source."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            named = [s for s in sides if getattr(s, "attr", getattr(s, "id", "")) == "source"]
            strings = {c.value for s in sides for c in ast.walk(s) if isinstance(c, ast.Constant)}
            if named and strings & NAMES:
                found.append(node.lineno)
    return found


def test_nothing_outside_rollout_branches_on_a_source():
    assert compared_with_a_name(ast.parse("if text.source in ('student', 'x'): pass")) == [1], "it finds what it should"
    files = [path for path in (ROOT / "dpkd").rglob("*.py") if "rollout" not in path.parts]
    assert len(files) > 100
    for path in files:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert compared_with_a_name(tree) == [], path
        used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        assert not used & CLASSES, path


PAIRS = [
    {"prompt": f"say {word}", "chosen": f" {word} {word}", "rejected": f" not {word} at all"}
    for word in ("red", "blue", "cat", "dog", "tree", "house")
]


@pytest.mark.parametrize("loss", ["dpkd", "dpo", "dpkd-simpo"])
def test_pair_losses_train_on_a_preference_set(loss, settings_of, quiet, tmp_path):
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS), encoding="utf-8")
    changes = {"data.path": str(tmp_path / "pairs.jsonl"), "text.source": "preference", "terms.lm.weight": 0}
    rows = dict(make_plan(settings_of(loss, changes), Display(quiet)).sections["text"])
    assert rows == {"responses by": "dataset: chosen and rejected of each row"}
    folder = run.train(settings_of(loss, changes), console=quiet)
    assert sum(line["text/responses"] for line in read_metrics(folder.metrics)) == 12, "an epoch of six pairs"
    for line in folder.samples.read_text(encoding="utf-8").splitlines():
        sample = json.loads(line)
        row = next(row for row in PAIRS if row["prompt"] == sample["prompt"])
        assert [r["text"] for r in sample["responses"]] == [row["chosen"], row["rejected"]]
