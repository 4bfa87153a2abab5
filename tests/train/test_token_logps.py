"""Pair losses that read log-probs token by token, in the engine: against forwards of single responses in float64."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from test_invariants import _NoStep, gradients

from dpkd import losses
from dpkd.api import LossSpec
from dpkd.plugins import load_registry
from dpkd.train import loss_module, run
from dpkd.train.build import assemble
from dpkd.train.progress import Display

PLUGIN = '''
from dpkd.api import Card, LossConfig, LossSpec, PairLoss, Signal, Source, hookimpl, setting
from dpkd.functional import preference, token_mask


class Settings(LossConfig):
    """Strength."""

    beta: float = setting(0.7, description="strength", source="made up", gt=0)


class WeightedDPO(PairLoss[Settings]):
    """DPO whose log-ratios are averages, weighted by how likely the student at the start found each token."""

    def forward(self, x):
        of = zip(x.student_token_logps, x.teacher_token_logps, x.reference_token_logps, x.lengths, strict=True)
        gaps = []
        for log_q, log_p, log_ref, length in of:
            weight = log_ref.masked_fill(~token_mask(length, log_ref.shape[-1]), float("-inf")).softmax(-1)
            gaps.append((weight * (log_q - log_p)).sum(-1))
        return preference(self.config.beta * (gaps[0] - gaps[1]))


READS = {"student_token_logps", "teacher_token_logps", "reference_token_logps", "lengths"}
CARD = Card("Weighted", "One line.", "p", (Source("None", "https://example.org", "-"),), "never", "always")
SPEC = LossSpec("weighted-dpo", WeightedDPO, Settings, CARD, frozenset(map(Signal, READS)))


@hookimpl
def dpkd_losses():
    return [SPEC]
'''
# Responses of unequal lengths: the data's against the student's.
PAIRS = {"text.source": "pairs", "text.chosen": "dataset", "text.rejected": "student"}


@pytest.fixture
def weighted(install_plugin) -> None:
    install_plugin("stranger", {"weighted-dpo": PLUGIN})


def logps(model, prompt, response) -> np.ndarray:
    """log-prob of each token of a response, from one forward over it alone."""
    ids = [*prompt, *response]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].double().numpy()
    rows = logits[len(prompt) - 1 : -1]
    return np.array([row[t] - np.logaddexp.reduce(row) for row, t in zip(rows, response, strict=True)])


def by_hand(pairs, student, teacher, reference, beta: float = 0.7) -> float:
    """The mean of the loss over pairs of (prompt, response)."""
    values = []
    for pair in pairs:
        q, p, ref = ([logps(m, *sequence) for sequence in pair] for m in (student, teacher, reference))
        gap_t, gap_s = (np.average(q[i] - p[i], weights=np.exp(ref[i])) for i in (0, 1))
        values.append(np.logaddexp(0.0, -beta * (gap_t - gap_s)))
    return float(np.mean(values))


def test_the_engine_gives_each_token_its_log_prob(weighted, settings_of, quiet):
    resolved = settings_of("weighted-dpo", PAIRS)
    parts = assemble(resolved, run._accelerator(resolved), Display(quiet))
    step = parts.train_step
    assert step.reference is not None
    # The student must differ from what it was at the start, or the reference could be anything.
    student = step.inner.student
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(1.1)
    step.optimizer, step.clip = _NoStep(step.loss_module), None
    parts.prepare_sources()
    (batch,) = parts.builder.step_batches(0, [parts.builder.groups[0].source.next(0)])
    pairs = [group.sequences for group in batch.groups]
    assert len({len(response) for pair in pairs for _, response in pair}) > 2
    found = step([batch], lr=0.0, measure=False).averages()["loss/main"]
    student.eval()
    expected = by_hand(pairs, student, step.teacher.model, step.reference.model)
    assert found == pytest.approx(expected, rel=1e-4)
    assert expected != pytest.approx(by_hand(pairs, student, step.teacher.model, student), rel=1e-3)


def test_padding_and_accumulation_change_nothing(weighted, settings_of, quiet, tmp_path):
    found = []
    for micro in (8, 4, 2):
        changes = {**PAIRS, "train.micro_batch_size": micro, "output": str(tmp_path / f"m{micro}")}
        found.append(gradients(settings_of("weighted-dpo", changes), quiet)[0])
    for one, other in pairwise(found):
        for name, value in one.items():
            torch.testing.assert_close(value, other[name], rtol=1e-5, atol=1e-7)


def test_a_loss_that_does_not_ask_pays_nothing(settings_of, quiet, monkeypatch):
    def never(*_):
        raise AssertionError("nobody reads single tokens")

    monkeypatch.setattr(loss_module, "by_segment", never)
    gradients(settings_of("dpkd", PAIRS), quiet)


def test_the_same_from_the_library(weighted):
    """From logits: the values of float64 sums over the labeled tokens, whatever stands around them."""
    spec = load_registry({"DPKD_PLUGINS": "stranger"}).get(LossSpec, "weighted-dpo").spec
    generator = torch.Generator().manual_seed(0)
    student, teacher, reference = (torch.randn(4, 6, 5, generator=generator, dtype=torch.float64) for _ in range(3))
    labels = torch.tensor([[-100, -100, 3, 1, 4, -100], [-100, 2, 2, -100, -100, -100]] * 2)
    labels[2:, 4] = 1
    found = losses.get(spec).from_logits(
        student_logits=student, teacher_logits=teacher, reference_logits=reference, labels=labels
    )

    def own(logits: torch.Tensor, row: int) -> np.ndarray:
        places = [t for t in range(6) if labels[row, t] != -100]
        log_q = logits[row].numpy() - np.logaddexp.reduce(logits[row].numpy(), axis=-1, keepdims=True)
        return np.array([log_q[t - 1, labels[row, t]] for t in places])

    gaps = [np.average(own(student, i) - own(teacher, i), weights=np.exp(own(reference, i))) for i in range(4)]
    expected = np.mean([np.logaddexp(0.0, -0.7 * (gaps[i] - gaps[i + 2])) for i in (0, 1)])
    assert float(found) == pytest.approx(expected, rel=1e-6)


def test_a_function_of_single_tokens_is_a_loss(weighted):
    def first_token(student_token_logps, teacher_token_logps):
        gaps = [q[:, 0] - p[:, 0] for q, p in zip(student_token_logps, teacher_token_logps, strict=True)]
        return (gaps[0] - gaps[1] - 1) ** 2

    loss = losses.get(first_token)
    one = torch.tensor([[-1.0, -2.0], [-3.0, 0.0]])
    value = loss(
        student_logps=(one.sum(-1), one.sum(-1)), student_token_logps=(one, 2 * one), teacher_token_logps=(one, one)
    )
    assert float(value) == pytest.approx(((1.0 - 1) ** 2 + (3.0 - 1) ** 2) / 2)
