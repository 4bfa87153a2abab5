"""The example of a teacher in a package of its own: installed and trained with; its bigrams against NumPy."""

from __future__ import annotations

import itertools
import re
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dpkd.api import Wants
from dpkd.cli.main import main

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "docs/examples/dpkd-ngram/dpkd_ngram.py"
TEXT = "the cat sat on the mat and the cat ran to the hat " * 4


@pytest.fixture
def ngram(install_plugin, tmp_path):
    """The example, installed, with a corpus; the settings that name it."""
    install_plugin("dpkd-ngram", {"teacher.ngram": EXAMPLE.read_text(encoding="utf-8")})
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(TEXT, encoding="utf-8")
    return corpus


def _model(tmp_path, tokenizer) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    folder = tmp_path / "student"
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        eos_token_id=256,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _data(tmp_path) -> Path:
    path = tmp_path / "train.jsonl"
    row = '{"prompt": "the cat", "completion": " sat on the mat and ran"}\n'
    path.write_text(row * 8, encoding="utf-8")
    return path


def test_its_log_probs_are_those_of_counted_bigrams(ngram, tokenizer_of):
    from dpkd.api import TeacherSpec
    from dpkd.plugins import load_registry

    spec = load_registry().get(TeacherSpec, "ngram").spec
    tokenizer = tokenizer_of()
    teacher = spec.open(spec.config(path=str(ngram), alpha=0.5))
    teacher.check(tokenizer)
    teacher.load(torch.device("cpu"))
    ids = tokenizer(TEXT)["input_ids"]
    pairs, firsts = Counter(itertools.pairwise(ids)), Counter(ids[:-1])
    prompt, response = ids[:3], ids[3:8]
    batch = SimpleNamespace(sequences=[(prompt, response)], targets=torch.tensor(response))
    found = teacher.score(batch, Wants(chunk=2, logps=True)).logps().numpy()
    v = len(tokenizer)
    before = [prompt[-1], *response[:-1]]
    expected = [np.log((pairs[a, b] + 0.5) / (firsts[a] + 0.5 * v)) for a, b in zip(before, response, strict=True)]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_run_learns_from_it(ngram, tmp_path, tokenizer_of, capsys):
    output = tmp_path / "run"
    arguments = [
        "train",
        "--loss",
        "kd",
        "--student",
        str(_model(tmp_path, tokenizer_of())),
        "--data",
        str(_data(tmp_path)),
    ]
    changes = {
        "teacher.kind": "ngram",
        "teacher.settings.path": ngram,
        "train.steps": 30,
        "train.lr": 0.02,
        "train.batch_size": 4,
        "train.log_every": 29,
        "data.min_response_words": 0,
    }
    for name, value in changes.items():
        arguments += ["--set", f"{name}={value}"]
    _run([*arguments, "--output", str(output)])
    from dpkd.run_metrics import read_metrics

    lines = read_metrics(output / "metrics.jsonl")
    assert lines[-1]["kl/forward"] < 0.5 * lines[0]["kl/forward"]
    assert "bigrams of" in _said([*arguments, "--dry-run"], capsys)


@pytest.mark.parametrize(
    ("loss", "changes", "message"),
    [
        ("hidden-mse", {}, "hidden states, which the n-gram model does not have"),
        ("seqkd", {}, "the n-gram model writes none"),
        ("kd", {"teacher.settings.alpha": 0}, "teacher.settings.alpha"),
        ("kd", {"teacher.kind": "ngramm"}, "did you mean ngram"),
        ("kd", {"teacher.model": "gpt2"}, "leave out `model` and `store`"),
    ],
)
def test_what_it_cannot_do_is_refused_in_the_plan(loss, changes, message, ngram, tmp_path, tokenizer_of, capsys):
    arguments = [
        "train",
        "--loss",
        loss,
        "--student",
        str(_model(tmp_path, tokenizer_of())),
        "--data",
        str(_data(tmp_path)),
    ]
    for name, value in {"teacher.kind": "ngram", "teacher.settings.path": ngram, **changes}.items():
        arguments += ["--set", f"{name}={value}"]
    with pytest.raises(SystemExit) as stopped:
        _run([*arguments, "--dry-run"])
    assert stopped.value.code in (1, 2)
    assert message in " ".join(capsys.readouterr().err.split())


def test_the_guide_quotes_the_example():
    guide = (ROOT / "docs/write-a-teacher.md").read_text(encoding="utf-8")
    blocks = re.findall(r"<!-- part of (\S+) -->\n```python\n(.*?)```", guide, flags=re.DOTALL)
    assert len(blocks) == 3
    for path, block in blocks:
        assert block.strip() in (ROOT / path).read_text(encoding="utf-8")


def _run(arguments: list[str]) -> None:
    before, sys.argv = sys.argv, ["dpkd", *map(str, arguments)]
    try:
        main()
    except SystemExit as stop:
        if stop.code:
            raise
    finally:
        sys.argv = before


def _said(arguments: list[str], capsys) -> str:
    _run(arguments)
    return " ".join(capsys.readouterr().out.split())
