"""Adaptive KL (Wu et al., 2404.02657): forward and reverse KL, weighted by where the two distributions differ.

Tokens are sorted by teacher probability; the head holds a mass of μ. The gap |p - q| in the head weighs the forward
KL, the gap in the tail the reverse KL, both over the whole vocabulary (§4.2).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

import dpkd.functional
from dpkd.api import Card, LossConfig, LossSpec, Signal, TokenInputs, TokenLoss, Trait, hookimpl, setting
from dpkd.functional import kl
from dpkd_zoo.papers import AKL, at


class AKLConfig(LossConfig):
    """Mass of the head, and the side of the token that crosses it."""

    mu: float = setting(0.5, description="μ: teacher mass of the head", source="AKL §4.2 and AKL.py", gt=0, lt=1)
    boundary: Literal["paper", "released"] = setting(
        "paper",
        description="the token that crosses μ is in the head (paper: smallest set with mass ≥ μ) or in the tail "
        "(released: cumulated mass ≤ μ, and always the likeliest token)",
        source="AKL §4.2; AKL.py differs",
    )


# Tokens that are looked for first: the head is a few tokens nearly everywhere.
FEW = 512
# Buckets of probabilities, by the upper bits of the number: several to each power of two.
BUCKETS = 1 << 14


def _bits(p_NV: Tensor) -> Tensor:
    """The numbers as whole ones, which are in the same order: floats that are not negative are."""
    return p_NV.view(torch.int64 if p_NV.dtype == torch.float64 else torch.int32)


def _crossing(p_NV: Tensor, mu: float) -> Tensor:
    """The probability `[N, 1]` of the token that crosses μ: the largest one that, with all above, has a mass of μ."""
    if not dpkd.functional.free_to_read(p_NV.device):
        return _crossing_by_halves(p_NV, mu)
    largest_N1 = p_NV.amax(-1, keepdim=True)
    if p_NV.numel() and bool((FEW * largest_N1 > mu).all()):
        likeliest_NK = p_NV.topk(min(FEW, p_NV.shape[-1]), dim=-1).values
        if bool((likeliest_NK.sum(-1) > mu + 1e-4).all()):
            return _first_past(likeliest_NK, mu)
    return _crossing_by_buckets(p_NV, mu)


def _first_past(sorted_NK: Tensor, mu: Tensor | float) -> Tensor:
    """Of probabilities in falling order the first `[N, 1]` at which their sum reaches μ, or the last that is not 0."""
    past_NK = sorted_NK.cumsum(-1) >= mu
    past_NK[:, :-1] |= sorted_NK[:, 1:] == 0
    past_NK[:, -1] = True
    return sorted_NK.gather(-1, past_NK.int().argmax(-1, keepdim=True))


def _crossing_by_halves(p_NV: Tensor, mu: float) -> Tensor:
    """As above, bit by bit from the highest: thirty sums, and the host looks at none."""
    bits_NV = _bits(p_NV)
    found_N1 = bits_NV.new_zeros(len(p_NV), 1)
    for place in range(61 if p_NV.dtype == torch.float64 else 29, -1, -1):  # 1.0 has no bit above
        tried_N1 = found_N1 | (1 << place)
        mass_N1 = p_NV.masked_fill(bits_NV < tried_N1, 0.0).sum(-1, keepdim=True)
        found_N1 = torch.where(mass_N1 >= mu, tried_N1, found_N1)
    return found_N1.view(p_NV.dtype)


def _crossing_by_buckets(p_NV: Tensor, mu: float) -> Tensor:
    """As above: the bucket that crosses μ, then its tokens in order. A quarter of what sorting all takes."""
    bucket_NV = (_bits(p_NV).long() >> (48 if p_NV.dtype == torch.float64 else 16)) & (BUCKETS - 1)
    mass_NB = p_NV.new_zeros(len(p_NV), BUCKETS).scatter_add_(-1, bucket_NV, p_NV)
    mass_NB = mass_NB.flip(-1).cumsum(-1).flip(-1)  # of a bucket and all above
    bucket_N1 = ((mass_NB >= mu).sum(-1, keepdim=True) - 1).clamp(min=0)
    above_N1 = mass_NB.gather(-1, (bucket_N1 + 1).clamp(max=BUCKETS - 1))
    inside_NV = bucket_NV == bucket_N1
    most = int(inside_NV.sum(-1).max()) if len(p_NV) else 1
    return _first_past(p_NV.masked_fill(~inside_NV, 0.0).topk(most, dim=-1).values, mu - above_N1)


@torch.no_grad()
def head_share(log_p_NV: Tensor, log_q_NV: Tensor, mu: float, boundary: str) -> Tensor:
    """g_head / (g_head + g_tail) `[N]`: the head's share of the gap Σ|p - q|; ½ where there is no gap.

    Tokens that are as likely as the one that crosses μ share the gap that is theirs in the head.
    """
    p_NV = log_p_NV.exp()
    crossing_N1 = _crossing(p_NV, mu)
    gap_NV = (p_NV - log_q_NV.exp()).abs_()
    total_N = gap_NV.sum(-1)
    below_NV, equal_NV = p_NV <= crossing_N1, p_NV == crossing_N1
    head_N, mass_N = (one.masked_fill(below_NV, 0.0).sum(-1) for one in (gap_NV, p_NV))
    equals_N, of_equals_N = equal_NV.sum(-1), gap_NV.masked_fill_(~equal_NV, 0.0).sum(-1)
    # The paper asks for the mass before a token: as long as it is below μ, the token is needed to reach μ.
    needed_N = (mu - mass_N) / crossing_N1.squeeze(-1)
    needed_N = needed_N.ceil() if boundary == "paper" else needed_N.floor()
    needed_N = torch.where((boundary == "paper") | (mass_N == 0), needed_N.clamp(min=1), needed_N.clamp(min=0))
    head_N = head_N + of_equals_N * (torch.minimum(needed_N, equals_N) / equals_N)
    # Two sums of the same gaps may round differently, hence the upper bound.
    share_N = (head_N / total_N.clamp(min=torch.finfo(total_N.dtype).tiny)).clamp(max=1.0)
    return torch.where(total_N > 0, share_N, 0.5)


class AKLLoss(TokenLoss[AKLConfig]):
    """`w · KL(p‖q) + (1-w) · KL(q‖p)` with `w = g_head / (g_head + g_tail)`, without gradient through w."""

    def forward(self, x: TokenInputs) -> Tensor:
        log_p_NV, log_q_NV = x.teacher_log_probs(), x.student_log_probs()
        share_N = head_share(log_p_NV, log_q_NV, self.config.mu, self.config.boundary)
        # A weight that rounds to 0 must not meet an infinite divergence: 0 · inf is NaN.
        tiny = torch.finfo(share_N.dtype).tiny
        forward_N = share_N.clamp(min=tiny) * kl(log_p_NV, log_q_NV)
        return forward_N + (1 - share_N).clamp(min=tiny) * kl(log_q_NV, log_p_NV)


SPEC = LossSpec(
    name="akl",
    loss=AKLLoss,
    config=AKLConfig,
    card=Card(
        title="Adaptive Kullback-Leibler",
        summary="Forward and reverse KL, weighted by the gap in the head and in the tail of the teacher.",
        formula="w·KL(p‖q) + (1-w)·KL(q‖p),  w = g_head/(g_head+g_tail),  g = Σ|p-q| over head or tail",
        sources=(at(AKL, "§4.2"),),
        use_when="Off-policy distillation for few epochs, where neither direction alone has converged.",
        avoid_when="Speed matters most: it needs both divergences and the teacher's likeliest tokens.",
        notes="The released code puts the token that crosses μ into the tail (boundary=released). Other "
        "implementations divide 0 by 0 where student and teacher agree; here the weights are ½ and the loss is 0. "
        "Infinite where only one of the models excludes a token (a logit of -inf). Published numbers are off-policy, "
        "without a pre-training corpus: GPT-2, 20 epochs, batch 32, lr 5e-4.",
        latex=r"w\,\mathrm{KL}(p\|q)+(1-w)\,\mathrm{KL}(q\|p), \qquad "
        r"w=\frac{g_\mathrm{head}}{g_\mathrm{head}+g_\mathrm{tail}}, \qquad g=\sum_{v}|p(v)-q(v)|\text{ over head or "
        r"tail}",
    ),
    reads=frozenset({Signal.STUDENT_LOGITS, Signal.TEACHER_LOGITS}),
    traits=frozenset({Trait.ZERO_AT_MATCH, Trait.NON_NEGATIVE, Trait.SHIFT_INVARIANT, Trait.DETACHED_WEIGHTS}),
)


@hookimpl
def dpkd_losses() -> list[LossSpec]:
    return [SPEC]
