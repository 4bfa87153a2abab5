"""The example of a response source: the page shows it as it is, and an installed copy is trained with."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from dpkd.api import Response, SourceContext, SourceSpec, Text
from dpkd.data.batch_sampler import BatchSampler
from dpkd.data.encode import Prompt
from dpkd.plugins import load_registry

DOCS = Path(__file__).parents[2] / "docs"
SOURCE = (DOCS / "examples/dpkd-best-of-n/dpkd_best_of_n.py").read_text(encoding="utf-8")
PAGE = (DOCS / "write-a-source.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL))
def test_every_block_of_the_page_is_a_piece_of_the_example(block):
    assert block.strip() in SOURCE


def test_it_keeps_the_response_that_the_teacher_finds_likeliest_per_token(install_plugin):
    """By hand: mean log-probs of -1, -0.5 and -2; the sums would choose the last."""
    install_plugin("stranger", {"source.best-of-n": SOURCE})
    spec = load_registry({"DPKD_PLUGINS": "stranger"}).get(SourceSpec, "best-of-n").spec
    logps = {(5,): (-1.0,), (5, 5, 5): (-0.5, -0.5, -0.5), (6, 9): (-2.0, -2.0)}

    def student(indices, _period):
        return [tuple(Response(ids, Text.STUDENT) for ids in logps) for _ in indices]

    def score(indices, responses):
        assert indices == [0, 0, 0]
        return [Response(r.ids, r.writer, teacher_logps=torch.tensor(logps[r.ids])) for r in responses]

    prompts, batches = [Prompt("a", (1,), (2, 9), (), "")], BatchSampler([3], batch_size=1, steps=1, seed=0)
    source = spec.open(
        spec.config(num_generations=3), SourceContext(prompts, batches, 0, frozenset({9}), student=student, score=score)
    )
    ((_, (kept,)),), counts = source.next(0)
    assert kept.ids == (5, 5, 5)
    assert counts["responses"] == 1
    restored = spec.open(spec.config(), SourceContext(prompts, batches, 0, frozenset({9})))
    restored.restore(source.state())
    assert restored.state() == source.state()
