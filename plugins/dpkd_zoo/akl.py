"""Adaptive KL (Wu et al., 2404.02657): forward and reverse KL, weighted by where the two distributions differ.

Tokens are sorted by teacher probability; the head holds a mass of μ. The gap |p - q| in the head weighs the forward
KL, the gap in the tail the reverse KL, both over the whole vocabulary (§4.2).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from dpkd.api import Card, LossConfig, LossSpec, Signal, TokenInputs, TokenLoss, Trait, hookimpl, setting
from dpkd.functional import free_to_read, kl
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


def _likeliest(p_NV: Tensor, mu: float) -> tuple[Tensor, Tensor]:
    """Probabilities and ids of the likeliest tokens, sorted, enough of them to pass μ in every row.

    The head is a few tokens nearly everywhere: looking for them alone costs a tenth of sorting the vocabulary.
    """
    vocabulary = p_NV.shape[-1]
    k = 512
    if free_to_read(p_NV.device) and p_NV.numel():
        fewest = float(mu / p_NV.amax(-1).min())  # where all are as likely as the likeliest
        while k < fewest:
            k *= 8
    while k < vocabulary:
        likeliest_NK, ids_NK = p_NV.topk(k, dim=-1)
        if bool((likeliest_NK.sum(-1) > mu + 1e-4).all()):
            return likeliest_NK, ids_NK
        k *= 8
    return p_NV.sort(dim=-1, descending=True)


@torch.no_grad()
def head_share(log_p_NV: Tensor, log_q_NV: Tensor, mu: float, boundary: str) -> Tensor:
    """g_head / (g_head + g_tail) `[N]`: the head's share of the gap Σ|p - q|; ½ where there is no gap."""
    p_NV = log_p_NV.exp()
    likeliest_NK, ids_NK = _likeliest(p_NV, mu)
    mass_NK = likeliest_NK.cumsum(-1)
    # The paper asks for the mass before a token: as long as it is below μ, the token is needed to reach μ.
    head_NK = mass_NK - likeliest_NK < mu if boundary == "paper" else mass_NK <= mu
    head_NK[:, 0] = True
    gap_NV = p_NV.sub_(log_q_NV.exp()).abs_()
    total_N = gap_NV.sum(-1)
    head_N = gap_NV.gather(-1, ids_NK).masked_fill_(~head_NK, 0.0).sum(-1)
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
        avoid_when="Speed matters most: it needs both divergences and the teacher's likeliest tokens in order.",
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
