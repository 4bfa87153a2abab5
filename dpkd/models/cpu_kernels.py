"""Value and gradient of a `KLSum` on logits, for a CPU: a few rows at a time, which every pass finds in the cache.

The formulas are those of `dpkd.models.kernels`: for a value Σ_v φ(p_v, q_v) the gradient by the logits is
q (φ' - Σ q·φ'), φ' = ∂φ/∂q; `slope` is q·φ', up to a multiple of q, which the subtraction removes.

Shapes: n rows, b of one block, V vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dpkd.functional import KLSum
from dpkd.models.chunked import in_cache


def kl_sum_(
    student_nV: Tensor,
    teacher_nV: Tensor | None,
    targets_n: Tensor,
    terms: KLSum,
    weight: float,
    *,
    student_scale: float = 1.0,
    teacher_scale: float = 1.0,
) -> Tensor:
    """The terms `[n, 3]` of a `KLSum` in nats, before their factors (0 where absent); logits become the gradient.

    The gradient is that of `weight` times the sum over rows with respect to the raw logits: `scale` times these are
    the logits. `teacher_nV` None: only the likelihood is there.
    """
    values_n3 = torch.zeros(student_nV.shape[0], 3)
    student_factor, teacher_factor = student_scale / terms.temperature, teacher_scale / terms.temperature
    given_nV = student_nV if teacher_nV is None else teacher_nV
    for raw_bV, teacher_bV, targets_b, values_b3 in in_cache(student_nV, given_nV, targets_n, values_n3):
        log_q_bV = _log_softmax(raw_bV, student_factor)
        log_p_bV = _log_softmax(teacher_bV, teacher_factor) if terms.reads_teacher else None
        gradient_bV = _block(log_p_bV, log_q_bV, targets_b, terms, values_b3)
        raw_bV.copy_(gradient_bV.mul_(weight * student_factor))
    return values_n3


def _log_softmax(raw_bV: Tensor, factor: float) -> Tensor:
    wide_bV = raw_bV.float()
    return torch.log_softmax(wide_bV if factor == 1.0 else wide_bV * factor, -1)


def _block(log_p_bV: Tensor | None, log_q_bV: Tensor, targets_b: Tensor, terms: KLSum, values_b3: Tensor) -> Tensor:
    """The gradient by the logits; the values go where they belong. Overwrites both log-probabilities."""
    q_bV = log_q_bV.exp()
    at_b1 = targets_b.unsqueeze(-1)
    if terms.likelihood:
        values_b3[:, 2] = -log_q_bV.gather(-1, at_b1).squeeze(-1)
    if log_p_bV is None:
        gradient_bV = q_bV.mul_(terms.likelihood)
    else:
        p_bV = log_p_bV.exp()
        slope_bV = _slope(p_bV, q_bV, log_p_bV, log_q_bV, terms, values_b3)
        rest_b1 = terms.likelihood - slope_bV.sum(-1, keepdim=True)
        gradient_bV = slope_bV.addcmul_(q_bV, rest_b1)
    if terms.likelihood:
        gradient_bV.scatter_add_(-1, at_b1, torch.full_like(at_b1, -terms.likelihood, dtype=gradient_bV.dtype))
    return gradient_bV


def _slope(p_bV: Tensor, q_bV: Tensor, log_p_bV: Tensor, log_q_bV: Tensor, terms: KLSum, values_b3: Tensor) -> Tensor:
    """q·φ' of both divergences together."""
    if terms.forward and terms.reverse and terms.forward_share == terms.reverse_share:
        return _slope_of_one_mixture(p_bV, q_bV, log_p_bV, log_q_bV, terms, values_b3)
    slopes = []
    if terms.forward:
        m_bV = _mixture(p_bV, q_bV, terms.forward_share) if terms.forward_share else None
        gap_bV = log_p_bV - (log_q_bV if m_bV is None else m_bV.log())
        values_b3[:, 0] = _expected(p_bV, gap_bV)
        if m_bV is None:
            slopes.append(torch.mul(p_bV, -terms.forward, out=gap_bV))
        else:
            factor = -terms.forward * (1 - terms.forward_share)
            slopes.append(torch.div(q_bV, m_bV, out=gap_bV).mul_(p_bV).mul_(factor))
    if terms.reverse:
        m_bV = _mixture(p_bV, q_bV, terms.reverse_share) if terms.reverse_share != 1.0 else None
        gap_bV = log_q_bV.sub_(log_p_bV if m_bV is None else m_bV.log())
        values_b3[:, 1] = _expected(q_bV, gap_bV)
        slope_bV = gap_bV.mul_(q_bV)
        if m_bV is not None:
            slope_bV.addcmul_(m_bV.reciprocal_().mul_(q_bV), q_bV, value=terms.reverse_share - 1)
        slopes.append(slope_bV if terms.reverse == 1.0 else slope_bV.mul_(terms.reverse))
    return slopes[0] if len(slopes) == 1 else slopes[0].add_(slopes[1])


def _slope_of_one_mixture(
    p_bV: Tensor, q_bV: Tensor, log_p_bV: Tensor, log_q_bV: Tensor, terms: KLSum, values_b3: Tensor
) -> Tensor:
    """Of a divergence like JSD: both sides have the same m = s p + (1-s) q."""
    share = terms.forward_share
    m_bV = _mixture(p_bV, q_bV, share)
    log_m_bV = m_bV.log()
    values_b3[:, 0] = _expected(p_bV, log_p_bV.sub_(log_m_bV))
    gap_bV = log_q_bV.sub_(log_m_bV)
    values_b3[:, 1] = _expected(q_bV, gap_bV)
    slope_bV = gap_bV.mul_(q_bV).mul_(terms.reverse)
    if math.isclose(terms.forward * (1 - share), terms.reverse * share):
        return slope_bV  # JSD itself: what is left out below is (F p + R q) q/m, a multiple of q
    weighted_bV = p_bV.mul_(terms.forward).add_(q_bV, alpha=terms.reverse)
    return slope_bV.addcmul_(weighted_bV, q_bV.div(m_bV), value=share - 1)


def _mixture(p_bV: Tensor, q_bV: Tensor, share: float) -> Tensor:
    """`share · p + (1 - share) · q`, and 1 where both are 0: whatever it is there counts for nothing."""
    m_bV = torch.lerp(q_bV, p_bV, share)
    return m_bV.masked_fill_(m_bV == 0, 1.0) if not bool(m_bV.all()) else m_bV


def _expected(mass_bV: Tensor, gap_bV: Tensor) -> Tensor:
    """`Σ mass · gap` `[b]`, with 0 · ±inf = 0, which is looked for only where the sum shows it."""
    found_b: Tensor = torch.linalg.vecdot(mass_bV, gap_bV)
    if not bool(found_b.isfinite().all()):
        gap_bV.masked_fill_(mass_bV == 0, 0.0)
        found_b = torch.linalg.vecdot(mass_bV, gap_bV)
    return found_b
