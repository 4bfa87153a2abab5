"""`train.ema`: the average against plain arithmetic, in the model that is saved, and over an interrupt."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from dpkd.train import checkpoint, run
from dpkd.train.ema import averaged, follow


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
def test_the_average_is_that_of_the_formula(make):
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = make([weight], lr=0.1)
    follow(optimizer, 0.75)
    expected = None
    for step in range(1, 6):
        weight.grad = torch.tensor([step * 1.0, -1.0 / step])
        optimizer.step()
        now = weight.detach().double()
        expected = now.clone() if expected is None else 0.75 * expected + 0.25 * now
    before = weight.detach().clone()
    with averaged(optimizer):
        torch.testing.assert_close(weight.detach().double(), expected, rtol=1e-6, atol=1e-7)
        assert not torch.equal(weight, before)
    assert torch.equal(weight, before)


def test_the_saved_model_is_the_average_and_an_interrupt_changes_nothing(settings_of, quiet, tmp_path):
    def settings(name, **changes):
        values = {"train.ema": 0.5, "train.lr": 0.01, "train.steps": 4, "output": str(tmp_path / name)}
        return settings_of("kd", {**values, **changes})

    folder = run.train(settings("whole"), console=quiet)
    newest = checkpoint.latest(folder.checkpoints).path
    state, weights = load_file(newest / "optimizer.safetensors"), load_file(newest / "weights.safetensors")
    saved = load_file(folder.model / "model.safetensors")
    name = next(name for name in saved if name.endswith("layers.0.mlp.up_proj.weight"))
    average = next(value for key, value in state.items() if key.endswith(f"{name}|ema"))
    trained = next(value for key, value in weights.items() if key.endswith(name))
    assert torch.equal(saved[name], average)
    assert not torch.equal(saved[name], trained)
