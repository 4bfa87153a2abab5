"""The layout of the code: one class per name, no teacher known by its class elsewhere, no loss in the core."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[1]
CORE = sorted((ROOT / "dpkd").rglob("*.py"))


def _classes() -> dict[str, list[str]]:
    found = defaultdict(list)
    for path in [*CORE, *sorted((ROOT / "plugins").rglob("*.py"))]:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                found[node.name].append(str(path.relative_to(ROOT)))
    return found


def test_no_two_classes_have_one_name():
    found = _classes()
    assert len(found) > 200
    assert {name: files for name, files in found.items() if len(files) > 1} == {}


def _asked_classes(path: Path) -> set[str]:
    """The second arguments of isinstance, by name, that end in Teacher or are outputs of one."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance":
            names |= {n.id for n in ast.walk(node.args[1]) if isinstance(n, ast.Name)}
    return {name for name in names if name.endswith("Teacher") or name in ("TeacherRows", "StoredRows", "AlignedRows")}


def test_nobody_asks_for_the_class_of_a_teacher():
    outside = [path for path in CORE if path.parent.name != "teachers"]
    assert len(outside) > 150
    assert {str(p.relative_to(ROOT)): found for p in outside if (found := _asked_classes(p))} == {}


def test_the_core_names_no_setting_of_a_loss():
    """β and temperature belong to losses: the core asks the spec, or the loss."""
    asked = re.compile(r"config, \"(beta|temperature)\"|config\.(beta|temperature)\b")
    hits = {str(path.relative_to(ROOT)) for path in CORE if asked.search(path.read_text(encoding="utf-8"))}
    assert hits == set()
