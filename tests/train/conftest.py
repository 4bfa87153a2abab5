"""Toy runs, also under a teacher of another tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes
from toy_runs import _fresh_accelerate, quiet, settings_of, stops, toy  # noqa: F401

from dpkd import functional
from dpkd.data.batches import collate
from dpkd.train import microbatch
from dpkd.train.timings import CudaClock


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


class Event:
    """An event of a GPU that is `behind` moments behind the host: it has passed when so many others were recorded."""

    behind, recorded = 3, 0

    def __init__(self, enable_timing):
        assert enable_timing
        self.waited = False

    def record(self):
        type(self).recorded += 1
        self.number = self.recorded

    def query(self):
        return self.waited or self.number + self.behind <= self.recorded

    def synchronize(self):
        self.waited = True

    def elapsed_time(self, later):
        assert self.query(), "the host would wait"
        assert later.query(), "the host would wait"
        return 1e3 * (later.number - self.number)


@pytest.fixture
def far_clock(monkeypatch):
    """The clock of a GPU whose work is behind the host's."""
    monkeypatch.setattr(torch.cuda, "Event", Event)
    return CudaClock()


@pytest.fixture
def far_device(monkeypatch):
    """A device that is not free to read, and no other way to read it."""
    monkeypatch.setattr(functional, "free_to_read", lambda device: False)


@pytest.fixture
def no_reading(monkeypatch):
    """`no_reading()`: from there on no tensor is read. Collation, before the upload, may look at its own."""

    def refuse(*_, **__):
        raise AssertionError("the host reads a tensor")

    def on_the_host(*arguments, **named):
        with _disable_current_modes():
            return collate(*arguments, **named)

    def begin():
        monkeypatch.setattr(microbatch, "collate", on_the_host)
        for name in ("tolist", "numpy", "cpu", "item"):
            monkeypatch.setattr(torch.Tensor, name, refuse)

    return begin
