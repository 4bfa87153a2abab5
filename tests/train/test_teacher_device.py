"""`teacher.device`: a teacher on another device than the student, in every path that reads one."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch

from dpkd.errors import DpkdError
from dpkd.models.in_memory import InMemory
from dpkd.run_metrics import read_metrics
from dpkd.train import cache, run
from dpkd.train.plan import make_plan
from dpkd.train.progress import Display

PATHS = {
    "rows": ("kd", {}),
    "layers-of-the-teacher": ("rkl", {"text.source": "student"}),
    "logps-and-text": ("dpkd", {}),
    "rollouts-and-mix": ("minillm", {"text.teacher_mix": 0.2}),
    "text": ("seqkd", {}),
    "reference": ("dpo", {}),
}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU beside the CPU")
@pytest.mark.parametrize("path", PATHS)
def test_a_teacher_on_the_cpu_serves_a_student_on_the_gpu(path, settings_of, quiet):
    loss, changes = PATHS[path]
    resolved = settings_of(loss, {**changes, "train.device": "cuda", "teacher.device": "cpu"})
    lines = read_metrics(run.train(resolved, console=quiet).metrics)
    assert len(lines) == 2
    assert all(torch.isfinite(torch.tensor(line["loss/main"])) for line in lines)


@pytest.mark.parametrize("device", ["cudda", "cuda:99"])
def test_a_device_that_is_not_there_is_refused_before_anything_is_loaded(device, settings_of, quiet):
    with pytest.raises(DpkdError, match=f"teacher.device: {device} is not available on this machine"):
        make_plan(settings_of("kd", {"teacher.device": device}), Display(quiet))


def test_a_store_is_written_on_the_device_that_is_named(settings_of, quiet, monkeypatch, tmp_path):
    seen = SimpleNamespace(device=None)

    def load(self, settings, *, device, dtype):
        seen.device = device
        raise DpkdError("enough is known")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(InMemory, "load", load)
    with pytest.raises(DpkdError, match=re.escape("enough is known")):
        cache.cache(settings_of("kd", {"teacher.device": "cpu"}), tmp_path / "s", console=quiet)
    assert seen.device == torch.device("cpu")
