"""What docs/python.md calls public: documented, typed for users, and typed in the wheel too."""

from __future__ import annotations

import importlib
import inspect
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from reference import MODULES, public_names

from dpkd import api

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/python.md").read_text(encoding="utf-8")

GOOD = '''
"""A loss, a metric and a run, as a user would write them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

import dpkd
from dpkd.api import (
    Answers, Card, LossConfig, LossSpec, MetricSpec, PairInputs, PairLoss, Rollout, RolloutInputs, RolloutLoss, Signal,
    Source, TokenInputs, TokenLoss, Trait, hookimpl, setting,
)
from dpkd.errors import DpkdError, Stopped
from dpkd.functional import kl, preference
from dpkd.testing import check_loss, parametrize_checks


class Settings(LossConfig):
    """How much."""

    power: float = setting(1.0, description="exponent", source="made up", ge=1, le=2)


class Token(TokenLoss[Settings]):
    """KL to a power."""

    def forward(self, x: TokenInputs) -> Tensor:
        return kl(x.teacher_log_probs(), x.student_log_probs()).pow(self.config.power)


class Preference(PairLoss[Settings]):
    """Of the teacher's response."""

    def forward(self, x: PairInputs) -> Tensor:
        return preference(x.student.chosen - x.student.rejected)


class Policy(RolloutLoss[Settings]):
    """A policy gradient."""

    def advantages(self, rollout: Rollout) -> Tensor:
        return rollout.teacher_logps - rollout.rollout_logps

    def forward(self, x: RolloutInputs) -> Tensor:
        return -x.advantages * x.student_logps()


SPEC = LossSpec(
    name="mine", loss=Token, config=Settings, reads=frozenset({Signal.STUDENT_LOGITS, Signal.TEACHER_LOGITS}),
    traits=frozenset({Trait.ZERO_AT_MATCH}),
    card=Card("Mine", "A KL.", "KL^power", (Source("None", "https://example.org"),), "never", "always"),
)


def letters(answers: Answers) -> Sequence[float]:
    return [float(len(text)) for text in answers.predictions]


@hookimpl
def dpkd_losses() -> list[LossSpec]:
    return [SPEC]


@hookimpl
def dpkd_metrics() -> list[MetricSpec]:
    return [MetricSpec("letters", "letters", "", "Length.", per_row=letters)]


@parametrize_checks(SPEC)
def test_it(check: object) -> None:
    assert check_loss(SPEC).loss == "mine"


def main(rows: list[dict[str, str]]) -> Path:
    try:
        run = dpkd.train(loss="mine", teacher="T", student=Path("S"), data=rows, settings={"train.lr": 1e-4})
    except Stopped as stopped:
        raise SystemExit(stopped.exit_code) from stopped
    except DpkdError as error:
        raise SystemExit(str(error)) from error
    score: float = dpkd.evaluate(run, rows, greedy=True)["rouge_l"]
    print(dpkd.__version__.upper(), score + 1.0)
    return dpkd.resume(run).model
'''

BAD = """
import dpkd
from dpkd.functional import kl

run = dpkd.train(loss=1)
run.modle
dpkd.evaluate("S", "data.jsonl", long_prompts="drop")
kl("p", "q")
"""


# What takes most of the time and is no part of dpkd: without its types a program passes no more easily.
CONFIG = """
[mypy]
[mypy-transformers.*,datasets.*,accelerate.*,peft.*,pandas.*,numpy.*,matplotlib.*]
follow_imports = skip
"""


@pytest.fixture(scope="module")
def errors(tmp_path_factory) -> dict[str, list[tuple[int, str]]]:
    """Line and kind of what `mypy --strict` says of two programs that are far from the sources of dpkd."""
    folder = tmp_path_factory.mktemp("user")
    for name, text in {"good.py": GOOD, "bad.py": BAD, "mypy.ini": CONFIG}.items():
        (folder / name).write_text(text, encoding="utf-8")
    command = [sys.executable, "-m", "mypy", "--strict", f"--cache-dir={ROOT}/.mypy_cache/users", "good.py", "bad.py"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if ": note: " not in line]
    assert re.fullmatch(r"Found \d+ errors in 1 file \(checked 2 source files\)", lines.pop()), (
        done.stdout + done.stderr
    )
    found: dict[str, list[tuple[int, str]]] = {"good.py": [], "bad.py": []}
    for line in lines:
        file, number, kind = re.fullmatch(r"([^:]+):(\d+): error: .*\[([\w-]+)\]", line).groups()
        found[file].append((int(number), kind))
    return found


def test_a_typed_program_passes_strict(errors):
    assert errors["good.py"] == []


def test_mistakes_of_a_program_are_seen(errors):
    assert errors["bad.py"] == [(5, "arg-type"), (6, "attr-defined"), (7, "arg-type"), (8, "arg-type"), (8, "arg-type")]


def public() -> list[tuple[str, str]]:
    return [(module, name) for module in MODULES for name in public_names(importlib.import_module(module))]


def test_the_page_names_the_public_modules():
    assert len(public()) > 50
    assert [module for module in MODULES if f"`{module}`" not in PAGE] == []
    assert "https://semver.org" in PAGE


@pytest.mark.parametrize(("module", "name"), public(), ids=".".join)
def test_every_public_name_is_documented(module, name):
    assert (importlib.import_module(module).__doc__ or "").strip()
    value = getattr(importlib.import_module(module), name)
    if not (inspect.isclass(value) or inspect.isfunction(value)):
        return  # a constant, or a marker
    assert (value.__doc__ or "").strip()
    assert not re.match(r"\w+\(.*\)$", value.__doc__), "the signature that a dataclass makes up is no docstring"
    own = [member for key, member in vars(value).items() if not key.startswith("_")] if inspect.isclass(value) else []
    functions = [getattr(member, "fget", member) for member in own]
    bare = [f.__name__ for f in functions if inspect.isfunction(f) and not (f.__doc__ or "").strip()]
    assert bare == []


def functions(path: str, value: Any) -> Iterator[tuple[str, Any, str]]:
    """A public function, or the methods and the constructor of a class: name, function, docstring."""
    if inspect.isfunction(value):
        yield path, value, value.__doc__ or ""
    elif inspect.isclass(value) and issubclass(value, tuple):
        yield path, value, value.__doc__ or ""
    elif inspect.isclass(value) and not issubclass(value, Enum | BaseModel):  # whose fields have descriptions
        for key, member in inspect.getmembers(value):
            function = getattr(member, "__func__", member)  # of a class method
            if not inspect.isfunction(function) or not (function.__module__ or "").startswith("dpkd"):
                continue
            if key == "__init__":
                yield path, function, (function.__doc__ or "") + (value.__doc__ or "")
            elif not key.startswith("_"):
                yield f"{path}.{key}", function, function.__doc__ or ""


def explained(doc: str) -> set[str]:
    """The names that a docstring explains: in backticks, or in front of a column. Names in examples do not count."""
    doc = re.sub(r"^ *>>> .*\n(?: *[^ >\n].*\n)*", "", doc, flags=re.MULTILINE)
    columns = re.findall(r"^ *(\w+(?:, \w+)*)  +\S", doc, flags=re.MULTILINE)
    return {*re.findall(r"`(\w+)`", doc), *(name for column in columns for name in column.split(", "))}


CALLABLES = [
    one for module, name in public() for one in functions(name, getattr(importlib.import_module(module), name))
]


@pytest.mark.parametrize(("function", "doc"), [one[1:] for one in CALLABLES], ids=[one[0] for one in CALLABLES])
def test_every_parameter_is_explained(function, doc):
    of_class = r"See `(\w+)\.(\w+)`"  # a method that says what its protocol says
    doc += "".join(getattr(getattr(api, owner), name).__doc__ for owner, name in re.findall(of_class, doc))
    parameters = inspect.signature(function).parameters.keys() - {"self", "cls"}
    assert sorted(parameters - explained(doc)) == []
    bare = [p.name for p in inspect.signature(function).parameters.values() if p.annotation is p.empty]
    assert sorted({*bare} & parameters) == []


def test_the_wheel_has_the_marker_of_both_packages(tmp_path):
    pytest.importorskip("hatchling", reason="a wheel is built by hatchling, which is not installed here")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--wheel-dir", str(tmp_path), str(ROOT)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("dpkd-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {"dpkd/py.typed", "dpkd_zoo/py.typed"} <= set(names)
