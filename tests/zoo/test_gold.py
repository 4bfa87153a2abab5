"""`gold`: common tokens by JSD, the others by rank, spans by the chain rule; with one vocabulary it is `jsd`."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from dpkd_zoo.gold import SPEC, GOLDConfig, GOLDLoss
from dpkd_zoo.jsd import JSDConfig, JSDLoss
from oracles_token import softmax, term
from torch import Tensor
from zoo_inputs import randn, token_inputs

from dpkd.api import Signal, TokenInputs
from dpkd.testing import check_loss

STUDENT, TEACHER = randn(4, 9, seed=1), randn(4, 9, seed=2)


def reference(*, student_logits: Any, teacher_logits: Any, student_rest: Any, teacher_rest: Any, config: Any) -> Any:
    """Row by row, over probabilities, in plain loops."""
    rows = zip(student_logits.tolist(), teacher_logits.tolist(), student_rest, teacher_rest, strict=True)
    return np.array([_row(*row, config) for row in rows])


def _row(z_q: Any, z_p: Any, rest_q: float, rest_p: float, config: Any) -> float:
    q = [mass * math.exp(rest_q) for mass in softmax(z_q)]
    p = [mass * math.exp(rest_p) for mass in softmax(z_p)]
    common = [i for i, (a, b) in enumerate(zip(z_q, z_p, strict=True)) if a != -math.inf and b != -math.inf]
    others = [i for i in range(len(q)) if i not in common] if config.hybrid else range(len(q))
    ranks = zip(sorted((p[i] for i in others), reverse=True), sorted((q[i] for i in others), reverse=True), strict=True)
    distance = sum(abs(a - b) for a, b in ranks)
    if not config.hybrid:
        return distance
    divergence = 0.0
    for i in common:
        m = config.beta * p[i] + (1 - config.beta) * q[i]
        divergence += config.beta * term(p[i], m) + (1 - config.beta) * term(q[i], m)
    share = len(common) / sum(z != -math.inf for z in z_p)
    weight = share if config.matched_weight is None else config.matched_weight
    return weight * divergence + (1 - weight) * distance


@pytest.mark.parametrize(
    "config", [{}, {"beta": 0.1}, {"hybrid": False}, {"matched_weight": 0.3}, {"matched_weight": 1.0, "beta": 0.9}]
)
def test_conforms_and_equals_loops(config: dict[str, Any]) -> None:
    check_loss(SPEC, config=config, reference=reference)


def spans(student: Tensor, teacher: Tensor, rest_q: Any, rest_p: Any) -> TokenInputs:
    """Inputs of spans whose rest has these log-probs."""
    given = token_inputs(student, teacher)._signals
    rests = {Signal.STUDENT_REST: torch.as_tensor(rest_q), Signal.TEACHER_REST: torch.as_tensor(rest_p)}
    return TokenInputs({**given, **rests})


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_with_one_vocabulary_and_one_token_it_is_the_jsd(beta: float) -> None:
    nothing = torch.zeros(4, dtype=torch.float64)
    found = GOLDLoss(GOLDConfig(beta=beta))(spans(STUDENT, TEACHER, nothing, nothing))
    torch.testing.assert_close(found, JSDLoss(JSDConfig(beta=beta))(token_inputs(STUDENT, TEACHER)))


def test_the_mass_of_a_span_is_that_of_its_tokens() -> None:
    """One common token of mass 1: JSD between ½·¼ and ½ by hand, where the rest has ¼ under the student."""
    one = torch.zeros(1, 1, dtype=torch.float64)
    x = spans(one, one, [math.log(0.25)], [math.log(0.5)])
    m = 0.5 * (0.25 + 0.5)
    expected = 0.5 * 0.25 * math.log(0.25 / m) + 0.5 * 0.5 * math.log(0.5 / m)
    assert GOLDLoss(GOLDConfig())(x).item() == pytest.approx(expected)
    assert expected > 0  # though neither side sums to 1


def test_the_rest_of_a_span_has_its_gradient() -> None:
    loss = GOLDLoss(GOLDConfig(matched_weight=0.6))
    student, teacher = randn(3, 6, seed=3), randn(3, 6, seed=4)
    student[:, 0], teacher[:, 5] = -math.inf, -math.inf
    rest_p = torch.tensor([-1.0, 0.0, -3.0], dtype=torch.float64)

    def value(rest_q: Tensor) -> Tensor:
        return loss(spans(student, teacher, rest_q, rest_p))

    assert torch.autograd.gradcheck(value, torch.tensor([-0.5, -2.0, -1.0], dtype=torch.float64).requires_grad_())


def test_is_zero_where_both_give_every_token_the_same() -> None:
    """Each vocabulary has a token of its own: of equal mass they match by rank."""
    student = torch.tensor([[1.0, 2.0, 0.5, -math.inf]])
    teacher = torch.tensor([[1.0, 2.0, -math.inf, 0.5]])
    assert GOLDLoss(GOLDConfig())(spans(student, teacher, [-1.0], [-1.0])).item() == 0.0


def test_unnormalised_masses_never_give_a_negative_value() -> None:
    rest_q, rest_p = -randn(200, seed=5).abs(), -randn(200, seed=6).abs()
    for beta in (0.05, 0.5, 0.95):
        loss = GOLDLoss(GOLDConfig(beta=beta, matched_weight=1.0))
        assert loss(spans(randn(200, 5, seed=7), randn(200, 5, seed=8), rest_q, rest_p)).min() > -1e-15
