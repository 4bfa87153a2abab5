"""Value and gradient of a `KLSum` on logits, fused: three passes over the logits of both models, no copy of either.

One program works on one row. The first pass finds both normalizers, the second the value and Σ q·φ', the third puts
the gradient where the student's logits were: for a value Σ_v φ(p_v, q_v) that is q (φ' - Σ q·φ'), φ' = ∂φ/∂q.
Logits are read in their own type (bfloat16, say), everything is computed in float32.

Shapes: n rows, V vocabulary. This module needs Triton; `dpkd.models.fused` says whether it is there.
"""

# Triton reads the annotations of kernels itself, and knows its own alone.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpkd.functional import KLSum

# Few numbers for each thread, so that the loads of other programs hide those of one: the fastest of nine on an H200.
BLOCK, WARPS, STAGES = 2048, 8, 3
# Of a term: 0 absent, 1 a KL to the other model itself, 2 a KL to a mixture.
PLAIN = tl.constexpr(1)


@triton.jit
def _normalizer(
    base, factor, V: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr
):  # log Σ exp; a lane keeps its own maximum until the end, and takes one exponential a logit: the other is 1
    top = tl.full([BLOCK], -1e30, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in tl.range(0, V, BLOCK, num_stages=STAGES):
        at = start + tl.arange(0, BLOCK)
        z = tl.load(base + at, mask=at < V, other=float("-inf")).to(tl.float32) * factor
        small = tl.exp(-tl.abs(z - top))
        total = tl.where(z > top, total * small + 1, total + small)
        top = tl.maximum(top, z)
    highest = tl.max(top, 0)
    return highest + tl.log(tl.sum(total * tl.exp(top - highest), 0))


@triton.jit
def _forward_term(lp, lq, p, q, share, MODE: tl.constexpr):  # of KL(p‖m): the value, and q·φ'
    if MODE == PLAIN:
        value = tl.where(p > 0, p * (lp - lq), 0.0)
        slope = -p
    else:
        m = share * p + (1 - share) * q
        value = tl.where(p > 0, p * (lp - tl.log(m)), 0.0)
        slope = tl.where(q > 0, -(1 - share) * p * (q / m), 0.0)
    return value, slope


@triton.jit
def _reverse_term(lp, lq, p, q, share, MODE: tl.constexpr):  # of KL(q‖m): the value, and q·φ'
    if MODE == PLAIN:
        value = tl.where(q > 0, q * (lq - lp), 0.0)
        slope = value  # φ' may have any constant: it is gone after the subtraction
    else:
        m = share * p + (1 - share) * q
        value = tl.where(q > 0, q * (lq - tl.log(m)), 0.0)
        slope = value - tl.where(q > 0, (1 - share) * q * (q / m), 0.0)
    return value, slope


@triton.jit
def _kl_sum_rows(
    student,
    teacher,
    targets,
    values,  # [n, 3] float32: the terms before their factors
    student_stride,
    teacher_stride,
    student_factor,  # logit scale / temperature
    teacher_factor,
    forward,
    reverse,
    likelihood,
    forward_share,
    reverse_share,
    weight,  # of each row, and the derivative of the logits by what is in memory
    V: tl.constexpr,
    FORWARD: tl.constexpr,
    REVERSE: tl.constexpr,
    LIKELIHOOD: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    z_row = student + row * student_stride
    y_row = teacher + row * teacher_stride
    log_q_total = _normalizer(z_row, student_factor, V, BLOCK, STAGES)
    log_p_total = 0.0
    if FORWARD + REVERSE > 0:
        log_p_total = _normalizer(y_row, teacher_factor, V, BLOCK, STAGES)
    target = -1
    if LIKELIHOOD:
        target = tl.load(targets + row).to(tl.int32)
        z = tl.load(z_row + target).to(tl.float32) * student_factor
        tl.store(values + row * 3 + 2, log_q_total - z)
    slope_total = 0.0
    if FORWARD + REVERSE > 0:
        forward_value = tl.zeros([BLOCK], tl.float32)
        reverse_value = tl.zeros([BLOCK], tl.float32)
        slope = tl.zeros([BLOCK], tl.float32)
        for start in tl.range(0, V, BLOCK, num_stages=STAGES):
            at = start + tl.arange(0, BLOCK)
            lq = tl.load(z_row + at, mask=at < V, other=float("-inf")).to(tl.float32) * student_factor - log_q_total
            lp = tl.load(y_row + at, mask=at < V, other=float("-inf")).to(tl.float32) * teacher_factor - log_p_total
            q = tl.exp(lq)
            p = tl.exp(lp)
            if FORWARD > 0:
                value, own = _forward_term(lp, lq, p, q, forward_share, FORWARD)
                forward_value += value
                slope += forward * own
            if REVERSE > 0:
                value, own = _reverse_term(lp, lq, p, q, reverse_share, REVERSE)
                reverse_value += value
                slope += reverse * own
        if FORWARD > 0:
            tl.store(values + row * 3, tl.sum(forward_value, 0))
        if REVERSE > 0:
            tl.store(values + row * 3 + 1, tl.sum(reverse_value, 0))
        slope_total = tl.sum(slope, 0)
    for start in tl.range(0, V, BLOCK, num_stages=STAGES):
        at = start + tl.arange(0, BLOCK)
        lq = tl.load(z_row + at, mask=at < V, other=float("-inf")).to(tl.float32) * student_factor - log_q_total
        q = tl.exp(lq)
        gradient = -q * slope_total
        if FORWARD + REVERSE > 0:
            lp = tl.load(y_row + at, mask=at < V, other=float("-inf")).to(tl.float32) * teacher_factor - log_p_total
            p = tl.exp(lp)
            if FORWARD > 0:
                _, own = _forward_term(lp, lq, p, q, forward_share, FORWARD)
                gradient += forward * own
            if REVERSE > 0:
                _, own = _reverse_term(lp, lq, p, q, reverse_share, REVERSE)
                gradient += reverse * own
        if LIKELIHOOD:
            gradient += likelihood * (q - tl.where(at == target, 1.0, 0.0))
        tl.store(z_row + at, (gradient * weight).to(student.dtype.element_ty), mask=at < V)


def _mode(factor: float, share: float, plain: float) -> int:
    """How a term is computed: absent, to the other model itself, to a mixture."""
    if factor == 0:
        return 0
    return 1 if share == plain else 2


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
    the logits. Each row must be contiguous. `teacher_nV` None: only the likelihood is there.
    """
    rows, vocabulary = student_nV.shape
    values = torch.zeros(rows, 3, device=student_nV.device, dtype=torch.float32)
    if rows == 0:
        return values
    teacher_nV = student_nV if teacher_nV is None else teacher_nV
    block = min(BLOCK, triton.next_power_of_2(vocabulary))
    student_factor = student_scale / terms.temperature
    _kl_sum_rows[(rows,)](
        student_nV,
        teacher_nV,
        targets_n,
        values,
        student_nV.stride(0),
        teacher_nV.stride(0),
        student_factor,
        teacher_scale / terms.temperature,
        terms.forward,
        terms.reverse,
        terms.likelihood,
        terms.forward_share,
        terms.reverse_share,
        weight * student_factor,
        V=vocabulary,
        FORWARD=_mode(terms.forward, terms.forward_share, 0.0),
        REVERSE=_mode(terms.reverse, terms.reverse_share, 1.0),
        LIKELIHOOD=terms.likelihood != 0,
        BLOCK=block,
        STAGES=STAGES,
        num_warps=max(1, min(WARPS, block // 256)),
    )
    return values
