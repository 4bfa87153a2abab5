"""`uld`: sorted probabilities, the cross-entropy of a span, and two vocabularies."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from dpkd_zoo.uld import SPEC, ULDConfig, ULDLoss
from oracles_token import softmax
from token_helpers import gradient, logs, out, value
from zoo_inputs import randn

from dpkd.api import Signal, TokenInputs
from dpkd.testing import check_loss

DISTANCE = ULDLoss(ULDConfig(ce_weight=0.0, uld_weight=1.0))
STUDENT, TEACHER = randn(4, 9, seed=1), randn(4, 9, seed=2)


def distance(p: Any, q: Any) -> float:
    """By selection: the largest of each is taken away, again and again; the shorter list has zeros after its end."""
    p, q, total = list(p), list(q), 0.0
    while p or q:
        a, b = max(p, default=0.0), max(q, default=0.0)
        total += abs(a - b)
        if p:
            p.remove(a)
        if q:
            q.remove(b)
    return total


def reference(
    *, student_logits: Any, teacher_logits: Any, config: Any, targets: Any = None, student_rest: Any = None
) -> Any:
    """CE of the row's text + λ · distance, row by row over probabilities."""
    values = []
    for i, (z_q, z_p) in enumerate(zip(student_logits.tolist(), teacher_logits.tolist(), strict=True)):
        q, p = softmax(z_q, config.temperature), softmax(z_p, config.temperature)
        total = config.uld_weight * distance(p, q)
        if config.ce_weight:
            total += config.ce_weight * (-math.log(softmax(z_q)[targets[i]]) - student_rest[i])
        values.append(total)
    return np.array(values)


@pytest.mark.parametrize(
    "config", [{}, {"ce_weight": 0.0}, {"uld_weight": 0.5, "temperature": 2.0}, {"ce_weight": 0.3, "temperature": 0.5}]
)
def test_conforms_and_equals_loops(config: dict[str, float]) -> None:
    check_loss(SPEC, config=config, reference=reference)


def test_by_hand() -> None:
    """(½, ½, 0) and (¼, ¾, 0) sorted: |½ - ¾| + |½ - ¼|."""
    assert value(DISTANCE, logs([0.25, 0.75, 0.0]), logs([0.5, 0.5, 0.0])).item() == pytest.approx(0.5)


def test_which_token_is_likely_does_not_matter() -> None:
    order = torch.randperm(9, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(value(DISTANCE, STUDENT[:, order], TEACHER), value(DISTANCE, STUDENT, TEACHER))
    assert value(DISTANCE, TEACHER[:, order], TEACHER).abs().max() < 1e-12


def test_is_at_most_two_and_zero_at_match() -> None:
    assert value(DISTANCE, logs([1.0] + [0.0] * 99), logs([0.01] * 100)).item() == pytest.approx(1.98)
    assert gradient(DISTANCE, TEACHER, TEACHER).abs().max() == 0


def test_a_vocabulary_of_another_size_is_padded_with_nothing() -> None:
    """Student of 5 tokens, teacher of 7: over their union (here 5 + 4, three in common) as over the lists alone."""
    student, teacher = randn(3, 5, seed=4), randn(3, 7, seed=5)
    wide_q = torch.cat([student, torch.full((3, 4), -math.inf)], dim=1)
    wide_p = torch.cat([torch.full((3, 2), -math.inf), teacher], dim=1)
    expected = [
        distance(softmax(z_p), softmax(z_q)) for z_p, z_q in zip(teacher.tolist(), student.tolist(), strict=True)
    ]
    assert value(DISTANCE, wide_q, wide_p).tolist() == pytest.approx(expected, abs=1e-12)
    found = gradient(DISTANCE, wide_q, wide_p)
    assert found.isfinite().all()
    assert found[:, 5:].abs().max() == 0


def test_the_cross_entropy_is_that_of_the_whole_span() -> None:
    """A span of two tokens with probabilities ½ and ¼: -log ⅛. The rest has its gradient."""
    rest = torch.tensor([math.log(0.25)], dtype=torch.float64, requires_grad=True)
    x = TokenInputs(
        {
            Signal.STUDENT_LOGITS: logs([0.5, 0.5]),
            Signal.TEACHER_LOGITS: logs([0.5, 0.5]),
            Signal.TARGETS: torch.tensor([0]),
            Signal.STUDENT_REST: rest,
        }
    )
    found = ULDLoss(ULDConfig())(x)
    assert found.item() == pytest.approx(math.log(8))
    found.sum().backward()
    assert rest.grad is not None
    assert rest.grad.item() == -1.0


def test_gradient_pulls_the_sorted_probabilities() -> None:
    """d/dq_(i) |p_(i) - q_(i)| = sign(q_(i) - p_(i)), through the softmax."""
    q, p = STUDENT.softmax(-1), TEACHER.softmax(-1)
    rank = q.argsort(-1, descending=True).argsort(-1)
    slope = (q - p.sort(-1, descending=True).values.gather(-1, rank)).sign()
    expected = q * (slope - (q * slope).sum(-1, keepdim=True))
    torch.testing.assert_close(gradient(DISTANCE, STUDENT, TEACHER), expected)


def test_excluded_tokens_come_last() -> None:
    student, teacher = out(STUDENT, 0, 3), out(TEACHER, 8)
    expected = [distance(softmax(a), softmax(b)) for a, b in zip(teacher.tolist(), student.tolist(), strict=True)]
    assert value(DISTANCE, student, teacher).tolist() == pytest.approx(expected, abs=1e-12)
