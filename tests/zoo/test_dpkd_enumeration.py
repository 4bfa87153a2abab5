"""What DPKD's gradient is on average over fresh pairs, with all responses of a small world enumerated, in float64.

With A = p(y_t) q(y_s), the probability of a pair, and B = q(y_t) p(y_s), that of the same pair the other way round, the
weight σ(r̂(y_s) - r̂(y_t)) of Eq. 11 is A^β / (A^β + B^β). Each pair occurs in both orders, so the mean gradient is
the sum over unordered pairs of (A^(1+β) - B^(1+β)) / (A^β + B^β) · (∇ log q(y_t) - ∇ log q(y_s)).
At β = 1 the factor is A - B, and because E_q[∇ log q] = 0 the sum is E_p[∇ log q]: the gradient of SeqKD. For β near
0 it is β/2 times that; and where no pair is won (A ≫ B, or B ≫ A, for all pairs) β times that. Pairs written by
an earlier student are another matter.

Responses: two tokens of three, nine in all; parameters are the student's logits.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dpkd import losses

TOKENS = 3
RESPONSES = [(a, b) for a in range(TOKENS) for b in range(TOKENS)]


def log_softmax(values):
    return values - np.log(np.exp(values).sum(-1, keepdims=True))


def logps_of(logits):
    """log-prob `[9]` of each response: logits `[1 + 3, 3]` of the first token, and of the second after each first."""
    logps = log_softmax(logits)
    return np.array([logps[0, a] + logps[1 + a, b] for a, b in RESPONSES])


def seqkd_gradient(logits, teacher):
    """∇ -Σ p(y) log q(y) by the logits: q(b|a) p(a) - p(a, b), from the definition of softmax."""
    p = np.exp(logps_of(teacher)).reshape(TOKENS, TOKENS)
    q = np.exp(log_softmax(logits))
    return np.vstack([q[0] - p.sum(1), *(q[1 + a] * p[a].sum() - p[a] for a in range(TOKENS))])


def dpkd_gradient(logits, teacher, beta, writer=None):
    """The loss's own gradient, averaged over y_t from p and y_s from `writer` (None: from q)."""
    z = torch.tensor(logits, requires_grad=True)
    logps = z.log_softmax(-1)
    log_q = torch.stack([logps[0, a] + logps[1 + a, b] for a, b in RESPONSES])
    log_p = torch.tensor(logps_of(teacher))
    t, s = torch.meshgrid(torch.arange(9), torch.arange(9), indexing="ij")
    t, s = t.flatten(), s.flatten()
    log_w = log_q if writer is None else torch.tensor(logps_of(writer))
    share = (log_p[t] + log_w[s]).exp().detach()  # sampling has no gradient
    dpkd = losses.get("dpkd", beta=beta, aggregation="sum")
    of_pairs = [
        dpkd(
            student_logps=(log_q[t[i : i + 1]], log_q[s[i : i + 1]]),
            teacher_logps=(log_p[t[i : i + 1]], log_p[s[i : i + 1]]),
            lengths=(torch.tensor([2]), torch.tensor([2])),
        )
        for i in range(len(t))
    ]
    (share * torch.stack(of_pairs)).sum().backward()
    return z.grad.numpy()


def world(distance):
    """A student and a teacher; `distance` stretches the logits of the first token, which have opposite signs."""
    logits = np.random.default_rng(3).normal(size=(2, 1 + TOKENS, TOKENS))
    logits[:, 0] = distance * np.array([[1.0, 0.3, -1.0], [-1.0, 0.2, 1.0]])
    return logits


def test_the_mean_margin_is_minus_beta_times_both_divergences():
    """E[r̂(y_t) - r̂(y_s)] = -β (KL(p‖q) + KL(q‖p)): never positive, however good the student."""
    student, teacher = world(1.0)
    log_q, log_p = logps_of(student), logps_of(teacher)
    p, q = np.exp(log_p), np.exp(log_q)
    margin = (p * (log_q - log_p)).sum() - (q * (log_q - log_p)).sum()
    both = (p * (log_p - log_q)).sum() + (q * (log_q - log_p)).sum()
    assert both > 0.5
    assert margin == pytest.approx(-both, rel=1e-12)


@pytest.mark.parametrize("distance", [0.1, 1.0, 4.0])
def test_with_beta_1_the_mean_gradient_is_that_of_seqkd(distance):
    student, teacher = world(distance)
    expected = seqkd_gradient(student, teacher)
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(dpkd_gradient(student, teacher, 1.0), expected, atol=1e-12)


@pytest.mark.parametrize(("beta", "distance", "weight"), [(1e-5, 1.0, 0.5), (0.3, 40.0, 1.0)])
def test_where_all_pairs_weigh_the_same_it_is_a_multiple_of_that_of_seqkd(beta, distance, weight):
    student, teacher = world(distance)
    expected = beta * weight * seqkd_gradient(student, teacher)
    assert np.abs(expected).max() > 0.01 * beta
    np.testing.assert_allclose(dpkd_gradient(student, teacher, beta), expected, atol=1e-4 * np.abs(expected).max())


def test_on_stale_pairs_it_is_another_gradient():
    """What the student no longer writes is pushed down all the same."""
    student, teacher = world(1.0)
    writer = student[::-1].copy()
    found, expected = dpkd_gradient(student, teacher, 1.0, writer), seqkd_gradient(student, teacher)
    assert np.abs(found - expected).max() > 0.2 * np.abs(expected).max()
