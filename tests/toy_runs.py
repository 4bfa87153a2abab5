"""Fixtures: a toy pair of models, toy data, and a way to run `train` on them in this process."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from dpkd.config.layers import Layer
from dpkd.config.resolve import resolve
from dpkd.errors import Stopped
from dpkd.plugins import load_registry

WORDS = ["red", "blue", "green", "old", "new", "big", "small", "cat", "dog", "tree", "house", "river", "sings", "runs"]


def torchrun(*arguments: str, port: int, timeout: float = 240, **options) -> subprocess.CompletedProcess[str]:
    """`torchrun --nproc-per-node 2 ARGUMENTS`, whose processes never outlive this call.

    They have sessions of their own, so they end only if their launcher is asked to stop and has the time to end them:
    `subprocess.run` would kill it at once.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    piped = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    with subprocess.Popen([*command, *arguments], **piped, **options) as launcher:
        try:
            output, errors = launcher.communicate(timeout=timeout)
        except BaseException:
            launcher.terminate()
            launcher.wait()
            raise
    return subprocess.CompletedProcess(launcher.args, launcher.returncode, output, errors)


def assert_same_weights(one: Path, other: Path) -> None:
    """The weights of two files of safetensors are the same, within what the order of sums changes."""
    found, expected = load_file(other), load_file(one)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5, msg=key)


def _tokenizer():
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    model.add_special_tokens([AddedToken("<eos>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<eos>", pad_token="<eos>")


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """A Llama teacher (4 layers) and a GPT-2 with dropout, both over bytes; and data of unequal lengths."""
    from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

    folder = tmp_path_factory.mktemp("toy")
    torch.manual_seed(0)
    sizes = {"vocab_size": 257, "bos_token_id": 256, "eos_token_id": 256}
    llama = LlamaConfig(hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64, **sizes)
    gpt2 = GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=256, **sizes)
    for name, config in (("teacher", llama), ("gpt2", gpt2)):
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():  # sharper than fresh weights, so that student and teacher differ
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.mul_(4)
        model.save_pretrained(folder / name)
        _tokenizer().save_pretrained(folder / name)
    rows = [
        {"prompt": " ".join(WORDS[i % 7 : i % 7 + 1 + i % 3]), "response": " ".join(WORDS[i % 5 : i % 5 + 1 + i % 4])}
        for i in range(24)
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "corpus.txt").write_text("\n".join(" ".join(WORDS[i:] + WORDS[:i]) for i in range(12)), encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def _fresh_accelerate(monkeypatch, tmp_path):
    """Accelerate keeps its state for the whole process; each run here starts anew. Stores stay in the test's folder."""
    from accelerate.state import AcceleratorState

    monkeypatch.setenv("DPKD_CACHE", str(tmp_path / "cache"))
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def settings_of(toy: Path, tmp_path: Path):
    """`settings_of(loss, {path: value})`: resolved settings of a short toy run."""

    def make(loss: str, changes: dict[str, object] | None = None, *, teacher: str | None = "teacher"):
        values = {
            "student.init": "layers",
            "student.layers": 2,
            "data.path": str(toy / "data.jsonl"),
            "train.steps": 2,
            "train.batch_size": 4,
            "train.micro_batch_size": 8,
            "train.log_every": 1,
            "train.device": "cpu",
            "train.lr": 1e-3,
            "train.warmup_steps": 0,
            "text.sampling.max_new_tokens": 8,
            "text.teacher_sampling.max_new_tokens": 8,
            "output": str(tmp_path / f"run-{loss}"),
        } | (changes or {})
        if teacher:
            values["teacher.model"] = str(toy / teacher)
        layers = [Layer("test", {"loss": {"name": loss}})]
        for path, value in values.items():
            for key in reversed(path.split(".")):
                value = {key: value}
            layers.append(Layer("test", value))
        return resolve(layers, load_registry())

    return make


class _StopAfter:
    """In the place of `dpkd.train.run.StopRequest`: asks to stop once so many steps were seen."""

    signal_number = 2

    def __init__(self, steps: int) -> None:
        self._left = steps

    def __call__(self, number: int, frame: object) -> None: ...

    @property
    def asked(self) -> bool:
        self._left -= 1
        return self._left <= 0


@pytest.fixture
def stops(monkeypatch):
    """`with stops(steps, match=None): ...`: the run in the block is asked to stop after so many steps, and does."""
    from dpkd.train import run

    @contextmanager
    def after(steps: int = 1, match: str | None = None):
        with monkeypatch.context() as patch:
            patch.setattr(run, "StopRequest", lambda: _StopAfter(steps))
            with pytest.raises(Stopped, match=match) as caught:
                yield caught

    return after


def assert_same_model(one, two) -> None:
    """The models of two run folders are equal bit for bit."""
    own, other = (load_file(folder.model / "model.safetensors") for folder in (one, two))
    assert own.keys() == other.keys()
    assert all(torch.equal(own[name], other[name]) for name in own)


@pytest.fixture
def quiet() -> Console:
    return Console(quiet=True)
