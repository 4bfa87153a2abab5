"""`dpkd-token`: the released objective, its switches, and the zero gradient where the argmaxes agree."""

from __future__ import annotations

import math

import pytest
import torch
from dpkd_zoo.dpkd_token import SPEC, DPKDTokenConfig, DPKDTokenLoss
from oracles import log_probs, minus_log_sigmoid
from zoo_inputs import randn, token_inputs

FORMS = ["sigmoid", "ipo", "dpop"]


def _oracle(z_q: list[float], z_p: list[float], config: DPKDTokenConfig) -> float:
    log_q, log_p = log_probs(z_q), log_probs(z_p)
    a, b = log_p.index(max(log_p)), log_q.index(max(log_q))
    h = log_q[a] - log_q[b]
    if not config.reference_free:
        h -= log_p[a] - log_p[b]
    if config.form == "ipo":
        return (h - 1 / (2 * config.beta)) ** 2
    eps = config.label_smoothing
    value = (1 - eps) * minus_log_sigmoid(config.beta * h) + eps * minus_log_sigmoid(-config.beta * h)
    if config.form == "dpop":
        value += config.dpop_weight * max(0.0, log_p[a] - log_q[a])
    return value


def test_by_hand() -> None:
    """p = .7 .2 .1, q = .2 .7 .1: a = 0, b = 1, h = log(2/7) - log(7/2) = 2 log(2/7)."""
    p, q = torch.tensor([[0.7, 0.2, 0.1]]).log(), torch.tensor([[0.2, 0.7, 0.1]]).log()
    value = DPKDTokenLoss(DPKDTokenConfig(beta=1))(token_inputs(q, p)).item()
    assert value == pytest.approx(math.log1p((7 / 2) ** 2))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("reference_free", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_equals_loops(form: str, reference_free: bool, smoothing: float) -> None:
    config = DPKDTokenConfig(
        beta=0.3, form=form, reference_free=reference_free, label_smoothing=smoothing, dpop_weight=2.0
    )
    student, teacher = randn(8, 5, seed=1), randn(8, 5, seed=2)
    expected = [_oracle(z_q, z_p, config) for z_q, z_p in zip(student.tolist(), teacher.tolist(), strict=True)]
    values = DPKDTokenLoss(config)(token_inputs(student, teacher))
    assert values.tolist() == pytest.approx(expected, abs=1e-12)


def test_agreeing_argmaxes_give_log_two_and_no_gradient_by_design() -> None:
    teacher = torch.tensor([[3.0, 0.0, 1.0]])
    student = torch.tensor([[2.0, -5.0, 1.9]], requires_grad=True)
    value = DPKDTokenLoss(DPKDTokenConfig())(token_inputs(student, teacher))
    value.sum().backward()
    assert value.item() == pytest.approx(math.log(2))
    assert student.grad is not None
    assert student.grad.abs().max() == 0
    assert "log 2" in SPEC.card.notes


@pytest.mark.parametrize("form", FORMS)
def test_no_gradient_at_match_in_any_form(form: str) -> None:
    teacher = randn(4, 5, seed=3)
    student = teacher.clone().requires_grad_()
    DPKDTokenLoss(DPKDTokenConfig(form=form))(token_inputs(student, teacher)).sum().backward()
    assert student.grad is not None
    assert student.grad.abs().max() == 0


def test_gradient_moves_two_logits_only() -> None:
    """-β σ(-βh) on the teacher's choice, the opposite on the student's."""
    teacher, student = torch.tensor([[2.0, 0.0, 1.0]]), torch.tensor([[0.5, 1.5, 1.0]], requires_grad=True)
    DPKDTokenLoss(DPKDTokenConfig(beta=0.5))(token_inputs(student, teacher)).sum().backward()
    h = (0.5 - 1.5) - (2.0 - 0.0)
    weight = 0.5 / (1 + math.exp(0.5 * h))
    torch.testing.assert_close(student.grad, torch.tensor([[-weight, weight, 0.0]]))


def test_the_dpop_penalty_stands_outside_sigma() -> None:
    """λ · (log p(a) - log q(a)) beside the sigmoid form, not scaled by β; none where q(a) ≥ p(a)."""
    p = torch.tensor([[0.6, 0.4], [0.6, 0.4]], dtype=torch.float64).log()
    q = torch.tensor([[0.3, 0.7], [0.8, 0.2]], dtype=torch.float64).log()
    plain = DPKDTokenLoss(DPKDTokenConfig())(token_inputs(q, p))
    dpop = DPKDTokenLoss(DPKDTokenConfig(form="dpop"))(token_inputs(q, p))
    assert (dpop - plain).tolist() == pytest.approx([50 * math.log(2), 0])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("reference_free", [False, True])
def test_gradcheck(form: str, reference_free: bool) -> None:
    teacher = randn(4, 5, seed=4)
    loss = DPKDTokenLoss(DPKDTokenConfig(form=form, reference_free=reference_free, dpop_weight=2.0))
    assert torch.autograd.gradcheck(lambda z: loss(token_inputs(z, teacher)), randn(4, 5, seed=5).requires_grad_())


def test_suggests_the_weights_of_the_script() -> None:
    assert SPEC.suggests["terms"] == {"main": 0.5, "lm": {"weight": 0.5}}
    assert "terms.pretrain" in SPEC.card.notes
