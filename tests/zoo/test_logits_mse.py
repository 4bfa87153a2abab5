"""`logits-mse`: centring, the factor, the limit of high temperature, excluded tokens."""

from __future__ import annotations

import math

import pytest
import torch
from dpkd_zoo.fkl import FKLConfig, FKLLoss
from dpkd_zoo.logits_mse import SPEC, LogitsMSEConfig, LogitsMSELoss
from oracles_token import logits_mse, reference
from token_helpers import gradient, out, value
from zoo_inputs import randn

from dpkd.testing import check_loss

LOSS = LogitsMSELoss(LogitsMSEConfig())
STUDENT, TEACHER = randn(4, 6, seed=1), randn(4, 6, seed=2)


def test_conforms_and_equals_loops() -> None:
    check_loss(SPEC, reference=reference(logits_mse))


def test_by_hand() -> None:
    """Differences 5, 5, 8: centred -1, -1, 2, squares 6 in sum, over 2 · 3."""
    teacher = torch.tensor([[1.0, 2.0, 3.0]])
    assert value(LOSS, teacher + torch.tensor([[5.0, 5.0, 8.0]]), teacher).item() == pytest.approx(1.0)


def test_gradient() -> None:
    """(d - mean d)/V."""
    gap = STUDENT - TEACHER
    torch.testing.assert_close(gradient(LOSS, STUDENT, TEACHER), (gap - gap.mean(-1, keepdim=True)) / 6)


def test_is_the_limit_of_forward_kl_at_high_temperature() -> None:
    hot = FKLLoss(FKLConfig(temperature=3000, scale_by_t2=True))
    torch.testing.assert_close(value(hot, STUDENT, TEACHER), value(LOSS, STUDENT, TEACHER), rtol=5e-3, atol=0)


def test_excluded_tokens_are_left_out_where_both_exclude_them() -> None:
    student, teacher, kept = out(STUDENT, 1, 5), out(TEACHER, 1, 5), [0, 2, 3, 4]
    torch.testing.assert_close(value(LOSS, student, teacher), value(LOSS, student[:, kept], teacher[:, kept]))
    assert gradient(LOSS, student, teacher)[:, [1, 5]].abs().max() == 0
    assert (value(LOSS, student, out(TEACHER, 1)) == math.inf).all()
    assert (value(LOSS, out(STUDENT, 5), teacher) == math.inf).all()
