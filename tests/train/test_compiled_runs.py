"""Compiled runs: what is compiled at the start serves all steps and all runs of a process; drawing is apart."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import yaml
from rich.console import Console

from dpkd.models import compile as compiling
from dpkd.models.compile import WORTH_STEPS
from dpkd.models.in_memory import InMemory
from dpkd.train import build, run, sweep_runners
from dpkd.train.build import _pays
from dpkd.train.sweep import read_sweep
from dpkd.train.sweep_running import run_sweep
from dpkd.train.trainer import Trainer

# The compiler's own words are not ours to mend.
pytestmark = [pytest.mark.filterwarnings("ignore")]


@pytest.fixture
def graphs(monkeypatch):
    """The number of graphs that were compiled before each step, and at the end; the eager backend runs them."""
    torch._dynamo.reset()
    seen, step = [0], Trainer._step

    def backend(graph, _inputs):
        seen[-1] += 1
        return graph.forward

    def counting(self, number, measure):
        seen.append(seen[-1])
        step(self, number, measure)

    monkeypatch.setattr(compiling, "BACKEND", backend)
    monkeypatch.setattr(Trainer, "_step", counting)
    yield seen
    torch._dynamo.reset()


@pytest.mark.parametrize("changes", [{"loss.name": "jsd", "text.source": "student"}, {"loss.name": "dpkd"}])
def test_the_next_run_of_a_process_compiles_nothing(changes, graphs, toy, tmp_path):
    settings = {
        "teacher.model": str(toy / "teacher"),
        "data.path": str(toy / "data.jsonl"),
        "student.init": "layers",
        "student.layers": 2,
        "train.steps": 2,
        "train.compile": "on",
        "train.device": "cpu",
        "text.sampling.max_new_tokens": 8,
        "text.teacher_sampling.max_new_tokens": 8,
        **changes,
    }
    stages = {"all": {"settings": settings, "matrix": {"seed": [1, 2]}}}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump({"output": str(tmp_path / "runs"), "stages": stages}))
    assert len(run_sweep(read_sweep(tmp_path / "sweep.yaml"), console=Console(quiet=True)).done) == 2
    for log in (tmp_path / "runs").glob("*.log"):
        assert "compiled: the student's layers, the teacher's layers" in log.read_text()
    start, *first, second, end = graphs
    # The layers of the student, of the teacher, and the loss; of pairs the layers in two layouts. Drawing needs none.
    assert 2 <= start <= 4
    assert set(first) <= {start, start + 1}  # a step whose rows are laid out otherwise than those of the comparison
    assert second == end == first[-1]


def test_auto_weighs_the_steps_of_all_runs_that_are_left():
    code = compiling.code_of(_llama()), compiling.code_of(_llama(16))
    assert code[0] != code[1]
    assert code[0] == compiling.code_of(_llama())
    assert _pays(code, WORTH_STEPS, InMemory())
    assert not _pays(code, WORTH_STEPS - 1, InMemory())
    assert _pays(code, WORTH_STEPS // 4, InMemory(runs_left=4))
    assert _pays(code, 1, InMemory(compiled={*code}))
    assert not _pays(code, 1, InMemory(compiled={code[0]}))


@pytest.mark.parametrize(
    ("choice", "device", "graphs", "steps", "layers", "loss"),
    [
        ("auto", "cuda", False, WORTH_STEPS, True, True),
        ("auto", "cuda", True, 100 * WORTH_STEPS, False, True),  # nothing is left to win for the layers
        ("auto", "cuda", False, WORTH_STEPS - 1, False, False),
        ("auto", "cpu", False, WORTH_STEPS, False, False),
        ("on", "cuda", True, 1, True, True),
        ("off", "cuda", False, WORTH_STEPS, False, False),
    ],
)
def test_what_is_compiled(choice, device, graphs, steps, layers, loss, settings_of, monkeypatch):
    compiled = []
    monkeypatch.setattr(build, "compile_checked", lambda *_, **__: compiled.append("layers"))
    monkeypatch.setattr(build, "compile_loss", lambda *_, **__: compiled.append("loss"))
    monkeypatch.setattr(build, "_graphs", lambda *_: graphs)
    resolved = settings_of("tvd", {"train.compile": choice})
    accelerator = SimpleNamespace(device=torch.device(device), autocast=nullcontext)
    models = SimpleNamespace(student=_llama(), teacher=None, autocasts=False, vocabulary=16)
    display = SimpleNamespace(say=lambda line: None)
    build._compile(resolved, models, {"main": None}, steps, (), accelerator, display)
    assert compiled == ["layers"] * layers + ["loss"] * loss


def _llama(width=8):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 16}
    return LlamaForCausalLM(LlamaConfig(hidden_size=width, **sizes))


def test_a_sweep_says_how_many_runs_are_left(settings_of, toy, tmp_path, monkeypatch):
    left = []
    monkeypatch.setattr(sweep_runners, "train", lambda resolved, **_: left.append(resolved.in_memory.runs_left))
    models = {"teacher.model": str(toy / "teacher"), "student.init": "layers", "student.layers": 2}
    settings = models | {"data.path": str(toy / "data.jsonl")}
    stages = {"all": {"settings": settings, "matrix": {"loss.name": ["kd", "jsd"], "seed": [1, 2]}}}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump({"output": str(tmp_path / "runs"), "stages": stages}))
    run_sweep(read_sweep(tmp_path / "sweep.yaml"), console=Console(quiet=True))
    assert left == [4, 4, 4, 4]  # none of these is finished: nothing was trained


@pytest.mark.parametrize("loss", ["tvd", "akl", "opd"])  # none is a sum of KL divergences, which a kernel computes
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_loss_is_compiled_for_the_inputs_that_it_gets(
    loss, precision, graphs, settings_of, quiet, tmp_path, monkeypatch
):
    """Signals in one order, views where the engine has views, the vocabulary of the run: no step compiles it again."""
    monkeypatch.setattr(build, "compile_checked", lambda *_args, **_kwargs: "left as they are")
    changes = {"train.compile": "on", "train.precision": precision, "train.steps": 3, "output": str(tmp_path / "run")}
    run.train(settings_of(loss, changes), console=quiet)
    assert len(graphs) == 4
    assert graphs == [1, 1, 1, 1]
