"""Toy runs, also under a teacher of another tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest
from toy_runs import _fresh_accelerate, quiet, settings_of, toy  # noqa: F401


@pytest.fixture(scope="session")
def foreign(tmp_path_factory):
    """A Llama teacher of another tokenizer."""
    from two_tokenizers import save_foreign

    return save_foreign(tmp_path_factory.mktemp("foreign"))


@pytest.fixture
def across(settings_of, toy: Path, foreign: Path, tmp_path: Path):  # noqa: F811
    """Settings of a run of the byte-level Llama under the foreign teacher, or (swap) the other way round."""

    def make(loss: str, changes: dict[str, object] | None = None, name: str = "run", *, swap: bool = False):
        student, teacher = map(str, (foreign, toy / "teacher") if swap else (toy / "teacher", foreign))
        models = {
            "student.init": "pretrained",
            "student.layers": None,
            "student.model": student,
            "teacher.model": teacher,
            "output": str(tmp_path / name),
        }
        return settings_of(loss, {**models, **(changes or {})}, teacher=None)

    return make
