"""Adaptive KL (Wu et al., 2404.02657): forward and reverse KL, weighted by where the two distributions differ.

Tokens are sorted by teacher probability; the head holds a mass of μ. The gap |p - q| in the head weighs the forward
KL, the gap in the tail the reverse KL, both over the whole vocabulary (§4.2).
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

import dpkd.functional
from dpkd.api import Card, LossConfig, LossSpec, Signal, TokenInputs, TokenLoss, Trait, hookimpl, setting
from dpkd.functional import kl
from dpkd_zoo.papers import AKL, at

# Heads mostly end among so many tokens; the whole vocabulary is sorted only where one does not.
FIRST_LOOK = 1024


class AKLConfig(LossConfig):
    """Mass of the head, and the side of the token that crosses it."""

    mu: float = setting(0.5, description="μ: teacher mass of the head", source="AKL §4.2 and AKL.py", gt=0, lt=1)
    boundary: Literal["paper", "released"] = setting(
        "paper",
        description="the token that crosses μ is in the head (paper: smallest set with mass ≥ μ) or in the tail "
        "(released: cumulated mass ≤ μ, and always the likeliest token)",
        source="AKL §4.2; AKL.py differs",
    )


def _crossing(p_NV: Tensor, mu: float) -> Tensor:
    """The probability `[N, 1]` of the token that crosses μ: the largest one that, with all above, has a mass of μ."""
    if not dpkd.functional.free_to_read(p_NV.device):
        return _crossing_by_halves(p_NV, mu)
    vocabulary = p_NV.shape[-1]
    if vocabulary > FIRST_LOOK and bool((p_NV.amax(-1) * FIRST_LOOK >= mu).all()):
        rising_NV = np.partition(p_NV.numpy(), vocabulary - FIRST_LOOK, axis=-1)
        crossing_N1, places_N1 = _in_order(torch.from_numpy(rising_NV[:, -FIRST_LOOK:]), mu)
        if bool((places_N1 < FIRST_LOOK).all()):
            return crossing_N1
    return _in_order(p_NV, mu)[0]


def _in_order(p_NV: Tensor, mu: float) -> tuple[Tensor, Tensor]:
    """The token that crosses μ and its place `[N, 1]` from the likeliest: V and the last token where none does."""
    # NumPy sorts with the processor's vector instructions: ten times as fast as PyTorch.
    falling_NV = torch.from_numpy(np.sort(p_NV.numpy(), axis=-1)).flip(-1)
    mass_NV = falling_NV.cumsum(-1)
    places_N1 = torch.searchsorted(mass_NV, mass_NV.new_full((len(mass_NV), 1), mu))
    return falling_NV.gather(-1, places_N1.clamp(max=mass_NV.shape[-1] - 1)), places_N1


def _crossing_by_halves(p_NV: Tensor, mu: float) -> Tensor:
    """As above, bit by bit from the highest: thirty sums in place of a sort, and the host looks at none."""
    # Floats that are not negative are in the order of their bits.
    bits_NV = p_NV.view(torch.int64 if p_NV.dtype == torch.float64 else torch.int32)
    found_N1 = bits_NV.new_zeros(len(p_NV), 1)
    for place in range(61 if p_NV.dtype == torch.float64 else 29, -1, -1):  # 1.0 has no bit above
        tried_N1 = found_N1 | (1 << place)
        mass_N1 = p_NV.masked_fill(bits_NV < tried_N1, 0.0).sum(-1, keepdim=True)
        found_N1 = torch.where(mass_N1 >= mu, tried_N1, found_N1)
    return found_N1.view(p_NV.dtype)


@torch.no_grad()
def head_share(log_p_NV: Tensor, log_q_NV: Tensor, mu: float, boundary: str) -> Tensor:
    """g_head / (g_head + g_tail) `[N]`: the head's share of the gap Σ|p - q|; ½ where there is no gap.

    Tokens that are as likely as the one that crosses μ share the gap that is theirs in the head.
    """
    p_NV = log_p_NV.exp()
    crossing_N1 = _crossing(p_NV, mu)
    gap_NV = (p_NV - log_q_NV.exp()).abs_()
    total_N = gap_NV.sum(-1)
    # Products with floats that are 0 and 1: on a CPU masks, and comparisons into bools, take several times as long.
    above_NV, equal_NV = p_NV.clone().gt_(crossing_N1), p_NV.clone().eq_(crossing_N1)
    mass_N, head_N = (p_NV * above_NV).sum(-1), (gap_NV * above_NV).sum(-1)
    equals_N, of_equals_N = equal_NV.sum(-1), (gap_NV * equal_NV).sum(-1)
    # The paper asks for the mass before a token: as long as it is below μ, the token is needed to reach μ.
    needed_N = (mu - mass_N) / crossing_N1.squeeze(-1)
    needed_N = needed_N.ceil() if boundary == "paper" else needed_N.floor()
    needed_N = torch.where((mass_N == 0) | (boundary == "paper"), needed_N.clamp(min=1), needed_N.clamp(min=0))
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
