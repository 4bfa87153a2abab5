"""The longest pass first, and what is left of it: nothing."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from dpkd.api import Text
from dpkd.errors import DpkdError
from dpkd.models.device import out_of_memory
from dpkd.train import run
from dpkd.train.build import assemble
from dpkd.train.probe import longest_responses
from dpkd.train.progress import Display
from dpkd.train.train_step import TrainStep


@pytest.mark.parametrize("loss", ["kd", "dpkd", "minillm", "taid"])
def test_a_probe_changes_nothing(loss, settings_of, toy, quiet, tmp_path):
    weights = []
    for probe in (False, True):
        folder = tmp_path / str(probe)
        # Dropout would show a change of the random numbers.
        changes = {
            "batch.probe": probe,
            "output": str(folder),
            "student.init": "pretrained",
            "student.layers": None,
            "student.model": str(toy / "gpt2"),
            "student.dropout": "keep",
            "terms.lm.weight": 0.5,
        }
        run.train(settings_of(loss, changes), console=quiet)
        weights.append(load_file(folder / "model" / "model.safetensors"))
    assert weights[0].keys() == weights[1].keys()
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name


@pytest.mark.parametrize("loss", ["kd", "seqkd", "dpkd"])
def test_no_step_is_longer_than_the_probe(loss, settings_of, quiet):
    settings = settings_of(loss, {"text.teacher_sampling.max_new_tokens": 9})
    run_parts = assemble(settings, run._accelerator(settings), Display(quiet))
    run_parts.prepare_sources()
    source, size = run_parts.builder.groups[0].source, 8
    text = longest_responses(run_parts.builder.groups[0], size)
    expected = {"kd": (Text.DATASET,), "seqkd": (Text.TEACHER,), "dpkd": (Text.TEACHER, Text.STUDENT)}[loss]
    assert all(tuple(r.writer for r in responses) == expected for _, responses in text.responses)

    def totals(step_text):
        found = [
            len(source.context.prompts[i].prompt_ids) + sum(len(r.ids) for r in rs) for i, rs in step_text.responses
        ]
        return sorted(found, reverse=True)

    longest = totals(text)
    assert len(longest) == size
    for step in range(run_parts.run_data.steps):
        seen = totals(source.next(step))
        assert seen
        assert all(own <= bound for own, bound in zip(seen, longest, strict=False))


def test_a_lack_of_memory_is_a_sentence(settings_of, quiet, monkeypatch):
    def fail(*_args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(TrainStep, "micro_step", fail)
    with pytest.raises(DpkdError, match=r"too small for this run. Lower train.micro_batch_size, or set batch.tokens"):
        run.train(settings_of("kd", {"batch.probe": True}), console=quiet)
    assert out_of_memory(RuntimeError("shapes differ")) is None
