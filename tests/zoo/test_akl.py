"""`akl`: the head on both sides of μ, the weights, and no 0/0 where the models agree."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from dpkd_zoo import akl
from dpkd_zoo.akl import AKLConfig, AKLLoss, head_share
from oracles import adaptive_kl, divergence, head_of, log_probs
from zoo_inputs import randn, token_inputs

from dpkd import functional

BOUNDARIES = ["paper", "released"]


def _logs(*probabilities: float) -> torch.Tensor:
    return torch.tensor([probabilities], dtype=torch.float64).log()


def test_the_crossing_token_is_in_the_papers_head_and_in_the_released_tail() -> None:
    """p = .4 .3 .3, μ = .5: the head is {0, 1} in the paper and {0} in the code; gaps .2 .1 .1."""
    p, q = _logs(0.4, 0.31, 0.29), _logs(0.2, 0.41, 0.39)
    assert head_share(p, q, 0.5, "paper").item() == pytest.approx(0.75)
    assert head_share(p, q, 0.5, "released").item() == pytest.approx(0.5)


def test_the_likeliest_token_is_always_in_the_head() -> None:
    p, q = _logs(0.9, 0.06, 0.04), _logs(0.5, 0.46, 0.04)
    for boundary in BOUNDARIES:
        assert head_share(p, q, 0.5, boundary).item() == pytest.approx(0.5)


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_gap_in_the_head_means_forward_gap_in_the_tail_reverse(boundary: str) -> None:
    loss = AKLLoss(AKLConfig(boundary=boundary, mu=0.55 if boundary == "paper" else 0.65))
    p = _logs(0.3, 0.3, 0.2, 0.2)
    head, tail = _logs(0.2, 0.4, 0.2, 0.2), _logs(0.3, 0.3, 0.1, 0.3)
    assert loss(token_inputs(head, p)).item() == pytest.approx(divergence(p[0].tolist(), head[0].tolist()))
    assert loss(token_inputs(tail, p)).item() == pytest.approx(divergence(tail[0].tolist(), p[0].tolist()))


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("mu", [0.2, 0.5, 0.9])
def test_equals_loops(boundary: str, mu: float) -> None:
    student, teacher = randn(6, 9, seed=1), randn(6, 9, seed=2)
    expected = [
        adaptive_kl(log_probs(z_p), log_probs(z_q), mu, boundary)
        for z_q, z_p in zip(student.tolist(), teacher.tolist(), strict=True)
    ]
    values = AKLLoss(AKLConfig(mu=mu, boundary=boundary))(token_inputs(student, teacher))
    assert values.tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("scale", [0.01, 0.5, 4.0])
def test_flat_and_peaked_teachers_over_a_large_vocabulary(boundary: str, scale: float) -> None:
    """Heads of one token, of hundreds and of half the vocabulary, in one call."""
    student, teacher = randn(2, 3000, seed=3), randn(2, 3000, seed=4, scale=scale)
    sharp = randn(1, 3000, seed=5, scale=8.0)
    student, teacher = torch.cat([student, student[:1]]), torch.cat([teacher, sharp])
    expected = [
        adaptive_kl(log_probs(z_p), log_probs(z_q), 0.5, boundary)
        for z_q, z_p in zip(student.tolist(), teacher.tolist(), strict=True)
    ]
    values = AKLLoss(AKLConfig(boundary=boundary))(token_inputs(student, teacher))
    assert values.tolist() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [0.0, 0.01, 1.0, 4.0])
@pytest.mark.parametrize("mu", [0.1, 0.5, 0.97])
def test_the_token_that_crosses_mu_is_found(dtype: torch.dtype, scale: float, mu: float) -> None:
    """In order and bit by bit, against sums in float64 over a sorted vocabulary; uniform, flat, peaked."""
    p = (scale * randn(7, 2500, seed=13)).softmax(-1).to(dtype)
    for find in (akl._crossing, akl._crossing_by_halves):
        for row, found in zip(p, find(p, mu).squeeze(-1).tolist(), strict=True):
            falling = np.sort(row.double().numpy())[::-1]
            place = int((falling.cumsum() < mu).sum())
            # Sums in float32 may cross a token earlier or later.
            assert falling[min(place + 1, 2499)] <= found <= falling[max(place - 1, 0)]
            assert dtype == torch.float32 or found == falling[place]
            assert found in row.tolist()


def test_tokens_as_likely_as_the_crossing_one_share_the_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    """p = .4 .2 .2 .2, gaps .1 .2 0 .1: μ = .5 takes the first token and one of the three, μ = .7 two of them."""
    p, q = _logs(0.4, 0.2, 0.2, 0.2), _logs(0.3, 0.4, 0.2, 0.1)
    for free in (True, False):
        monkeypatch.setattr(functional, "free_to_read", lambda device, free=free: free)
        assert head_share(p, q, 0.5, "paper").item() == pytest.approx((0.1 + 0.3 / 3) / 0.4)
        assert head_share(p, q, 0.7, "paper").item() == pytest.approx((0.1 + 0.3 * 2 / 3) / 0.4)
        assert head_share(p, q, 0.5, "released").item() == pytest.approx(0.1 / 0.4)
        assert head_share(p, q, 0.7, "released").item() == pytest.approx((0.1 + 0.3 / 3) / 0.4)


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_it_is_the_same_where_nobody_may_look(boundary: str, monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = randn(5, 700, seed=14), randn(5, 700, seed=15, scale=2.0)
    loss = AKLLoss(AKLConfig(boundary=boundary))
    expected = loss(token_inputs(student, teacher))
    monkeypatch.setattr(functional, "free_to_read", lambda device: False)
    torch.testing.assert_close(loss(token_inputs(student, teacher)), expected)


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_agreement_gives_zero_and_no_gradient(boundary: str, dtype: torch.dtype) -> None:
    teacher = torch.cat([randn(3, 6, seed=6, dtype=dtype), torch.zeros(1, 6, dtype=dtype)])
    student = teacher.clone().requires_grad_()
    values = AKLLoss(AKLConfig(boundary=boundary))(token_inputs(student, teacher))
    values.sum().backward()
    assert values.abs().max() == 0
    assert student.grad is not None
    assert student.grad.abs().max() < 1e-6


def test_no_gradient_through_the_weights() -> None:
    """The gradient is that of the two divergences with the weights held fixed."""
    student, teacher = randn(3, 5, seed=7).requires_grad_(), randn(3, 5, seed=8)
    AKLLoss(AKLConfig())(token_inputs(student, teacher)).sum().backward()
    log_q, log_p = student.detach().log_softmax(-1), teacher.log_softmax(-1)
    gap = (log_p.exp() - log_q.exp()).abs()
    expected = torch.zeros_like(gap)
    for i in range(3):
        head = head_of(log_p[i].tolist(), 0.5, "paper")
        w = sum(gap[i, v].item() for v in head) / gap[i].sum().item()
        reverse = divergence(log_q[i].tolist(), log_p[i].tolist())
        expected[i] = w * (log_q[i].exp() - log_p[i].exp())
        expected[i] += (1 - w) * log_q[i].exp() * (log_q[i] - log_p[i] - reverse)
    torch.testing.assert_close(student.grad, expected)


def test_gradcheck_with_weights_held_fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Finite differences see the weights move, so they are pinned for this check."""
    teacher = randn(3, 4, seed=9)
    share = torch.tensor([0.1, 0.5, 0.8], dtype=torch.float64)
    monkeypatch.setattr("dpkd_zoo.akl.head_share", lambda *_: share)
    loss = AKLLoss(AKLConfig())
    assert torch.autograd.gradcheck(lambda z: loss(token_inputs(z, teacher)), randn(3, 4, seed=10).requires_grad_())


def test_a_token_that_one_model_excludes_gives_infinity_even_where_its_weight_rounds_to_zero() -> None:
    """The paper's head is {0, 1}; its share of the gap is 1 - 5e-20, which no float holds: 0 · ∞ would be NaN.

    The other way round the head {0} has no gap at all, and the forward KL is infinite.
    """
    loss = AKLLoss(AKLConfig())
    q, p = _logs(0.5, 0.25, 0.25, 1e-20).float(), _logs(0.4, 0.35, 0.25, 0.0).float()
    assert head_share(p, q, 0.5, "paper").item() == 1
    assert loss(token_inputs(q, p)).item() == math.inf
    assert head_share(_logs(0.5, 0.25, 0.25), _logs(0.5, 0.5, 0.0), 0.5, "paper").item() == 0
    assert loss(token_inputs(_logs(0.5, 0.5, 0.0), _logs(0.5, 0.25, 0.25))).item() == math.inf


def test_tokens_that_both_exclude_change_nothing() -> None:
    student, teacher = randn(2, 4, seed=11), randn(2, 4, seed=12)
    out = torch.full((2, 3), -math.inf, dtype=torch.float64)
    loss = AKLLoss(AKLConfig())
    padded = loss(token_inputs(torch.cat([student, out], 1), torch.cat([teacher, out], 1)))
    torch.testing.assert_close(padded, loss(token_inputs(student, teacher)))
