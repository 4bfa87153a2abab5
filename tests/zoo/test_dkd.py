"""`dkd`: the decomposition of the KL, which token is the target, and rows with one token."""

from __future__ import annotations

import math

import pytest
import torch
from dpkd_zoo.dkd import SPEC, DKDConfig, DKDLoss
from oracles_token import dkd, reference
from token_helpers import gradient, logs, out, value
from zoo_inputs import randn, token_inputs

from dpkd.api import Signal
from dpkd.functional import kl
from dpkd.testing import check_loss

STUDENT, TEACHER, TARGETS = randn(4, 6, seed=1), randn(4, 6, seed=2), [0, 3, 5, 5]
P, Q = TEACHER.softmax(-1), STUDENT.softmax(-1)


def _loss(**settings: float | str) -> DKDLoss:
    return DKDLoss(DKDConfig(**settings))


@pytest.mark.parametrize(
    "settings", [{}, {"alpha": 0}, {"alpha": 2, "beta": 8, "temperature": 4.0}, {"target": "teacher", "beta": 0.5}]
)
def test_conforms_and_equals_loops(settings: dict[str, float]) -> None:
    check_loss(SPEC, config=settings, reference=reference(dkd))


def test_by_hand() -> None:
    """Target 0: p = ½ ¼ ¼, q = ¼ ½ ¼. The others: ½ ½ against ⅔ ⅓."""
    p, q = logs([0.5, 0.25, 0.25]), logs([0.25, 0.5, 0.25])
    target = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    others = 0.5 * math.log(3 / 4) + 0.5 * math.log(3 / 2)
    assert value(_loss(alpha=1, beta=8), q, p, [0]).item() == pytest.approx(target + 8 * others)


def test_parts_with_the_teachers_weight_are_the_kl() -> None:
    """KL = TCKD + (1 - p_t) NCKD (the paper's Eq. 5 to 6)."""
    x = token_inputs(STUDENT, TEACHER, TARGETS)
    _loss()(x)
    p_t = P[range(4), TARGETS]
    torch.testing.assert_close(x.parts["target"] + (1 - p_t) * x.parts["others"], kl(P.log(), Q.log()))


def test_gradient() -> None:
    """With e_t the target: α (q_t - p_t) on t against the rest in proportion to q, and β (q̂ - p̂) on the others."""
    p_t, q_t = (x[range(4), TARGETS].unsqueeze(-1) for x in (P, Q))
    is_target = torch.nn.functional.one_hot(torch.tensor(TARGETS), 6).bool()
    rest_p, rest_q = (x.masked_fill(is_target, 0) for x in (P, Q))
    hat_p, hat_q = rest_p / (1 - p_t), rest_q / (1 - q_t)
    expected = 3 * (q_t - p_t) * torch.where(is_target, 1.0, -hat_q) + 2 * (hat_q - hat_p)
    torch.testing.assert_close(gradient(_loss(alpha=3, beta=2), STUDENT, TEACHER, TARGETS), expected)


def test_the_target_may_be_the_teachers_choice() -> None:
    loss = _loss(target="teacher")
    assert Signal.TARGETS not in SPEC.signals(loss.config)
    assert Signal.TARGETS in SPEC.signals(DKDConfig())
    expected = value(_loss(), STUDENT, TEACHER, TEACHER.argmax(-1))
    torch.testing.assert_close(value(loss, STUDENT, TEACHER), expected)


def test_a_target_that_is_all_there_is() -> None:
    """Both models exclude all other tokens: nothing among them to compare."""
    only = out(torch.zeros(1, 3, dtype=torch.float64), 1, 2)
    assert value(_loss(), only, only, [0]).item() == 0
    assert gradient(_loss(), only, only, [0]).isfinite().all()


def test_a_target_that_the_teacher_excludes() -> None:
    student, teacher = randn(1, 4, seed=3), out(randn(1, 4, seed=4), 2)
    found = value(_loss(), student, teacher, [2]).item()
    q = student.softmax(-1)[0, 2].item()
    kept = [0, 1, 3]
    among = kl(teacher[:, kept].log_softmax(-1), student[:, kept].log_softmax(-1)).item()
    assert found == pytest.approx(-math.log(1 - q) + among)
