"""Random sampling KD (Anshumann et al., 2503.16870): forward KL estimated from a few tokens drawn from the teacher.

Tokens v₁ … v_S are drawn from r ∝ p^τ; `1/S Σ_s p(v_s)/r(v_s) · log(p(v_s)/q(v_s))` has expectation KL(p‖q), and its
gradient has the expectation q - p. The draws are a function of the seed and of the teacher's likeliest tokens at the
position: the same row gets the same tokens every time, as from the paper's store of samples.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dpkd.api import Card, LossConfig, LossSpec, Signal, TokenInputs, TokenLoss, Trait, hookimpl, setting
from dpkd_zoo.papers import SAMPLED_KD, at


class SampledKLConfig(LossConfig):
    """How many tokens are sampled, from what, and with which seed."""

    samples: int = setting(
        50, description="S: draws per position", source="the authors' poster: 50, about 12 tokens", ge=1
    )
    power: float = setting(
        1.0,
        description="τ: tokens are sampled in proportion to p^τ",
        source="the authors' poster: sampled from p",
        gt=0,
        le=2,
    )
    seed: int = setting(0, description="a different seed samples different tokens", source="our choice", ge=0)


def _scrambled(keys: Tensor) -> Tensor:
    """A hash of integers below 2³² to integers below 2³²; products wrap around in int64, of which 32 bits are kept."""
    for _ in range(2):
        keys = ((keys ^ (keys >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
    return keys ^ (keys >> 16)


def uniforms(log_p_NV: Tensor, samples: int, seed: int) -> Tensor:
    """Numbers in [0, 1) `[N, S]` that depend on the seed and on each row's four likeliest tokens, and on nothing else.

    Ids, not log-probs: rounding must not change the draw. Excluded tokens have no order.
    """
    top = log_p_NV.topk(min(4, log_p_NV.shape[-1]), dim=-1)
    ids_NK = top.indices.masked_fill(top.values == -math.inf, -1) + 1
    key_N = torch.full_like(ids_NK[:, 0], seed & 0xFFFFFFFF)
    for k in range(4):
        key_N = _scrambled(key_N) ^ (ids_NK[:, k] if k < ids_NK.shape[-1] else 0)
    counter_S = torch.arange(1, samples + 1, device=log_p_NV.device) * 0x9E3779B1
    bits_NS = _scrambled((_scrambled(key_N).unsqueeze(-1) + counter_S) & 0xFFFFFFFF)
    return (bits_NS >> 9).to(log_p_NV.dtype) / 2**23


def draw(log_r_NV: Tensor, uniform_NS: Tensor) -> Tensor:
    """Token ids `[N, S]` distributed as r, by its cumulated probabilities."""
    mass_NV = log_r_NV.exp().cumsum(-1)
    # right=True skips tokens without mass.
    ids_NS = torch.searchsorted(mass_NV, uniform_NS * mass_NV[:, -1:], right=True)
    return ids_NS.clamp(max=log_r_NV.shape[-1] - 1)


def estimate(log_p_NV: Tensor, log_q_NV: Tensor, log_r_NV: Tensor, ids_NS: Tensor) -> Tensor:
    """`1/S Σ_s p/r · log(p/q)` over the drawn tokens `[N]`: expectation KL(p‖q) when they are drawn from r."""
    log_p_NS, log_q_NS = log_p_NV.gather(-1, ids_NS), log_q_NV.gather(-1, ids_NS)
    weight_NS = (log_p_NS - log_r_NV.gather(-1, ids_NS)).exp()
    return (weight_NS * (log_p_NS - log_q_NS)).mean(-1)


class SampledKLLoss(TokenLoss[SampledKLConfig]):
    """`1/S Σ_s w_s log(p(v_s)/q(v_s))`, v_s drawn from the teacher, w_s = p/r."""

    def forward(self, x: TokenInputs) -> Tensor:
        c = self.config
        log_p_NV, log_q_NV = x.teacher_log_probs(), x.student_log_probs()
        log_r_NV = log_p_NV if c.power == 1 else (c.power * log_p_NV).log_softmax(-1)
        ids_NS = draw(log_r_NV, uniforms(log_p_NV, c.samples, c.seed))
        return estimate(log_p_NV, log_q_NV, log_r_NV, ids_NS)


SPEC = LossSpec(
    name="sampled-kl",
    loss=SampledKLLoss,
    config=SampledKLConfig,
    card=Card(
        title="Random sampling KD",
        summary="Forward KL from tokens sampled from the teacher: unbiased, where its top k would not be.",
        formula="1/S·Σₛ w(vₛ)·log(p(vₛ)/q(vₛ)),  vₛ ~ r ∝ p^τ,  w = p/r",
        sources=(
            at(
                SAMPLED_KD, "random sampling KD; the authors' akhilkedia/RandomSamplingKD, ACL_poster/Poster.pdf, box 4"
            ),
        ),
        use_when="You want to see what a store of sampled teacher tokens would give before building one: no bias, "
        "little noise.",
        avoid_when="The teacher is available: fkl is exact. Sampling saves storage, not time, as long as logits are "
        "read.",
        notes="Single values may be negative; only their expectation is the KL. At a student equal to the teacher the "
        "value is 0 but the gradient is not, except on average. The same seed gives the same draws at positions with "
        "the same four likeliest tokens, in all epochs: the paper's store does the same. The paper weighs by counts, "
        "c/S, which is τ = 1; for τ ≠ 1 weights here are p/r exactly, not normalized over the draws, which would "
        "bias. The loss itself takes about 0.6 times kd's time. Infinite where the student excludes a sampled token "
        "(a logit of -inf).",
        latex=r"\frac1S\sum_s w(v_s)\log\frac{p(v_s)}{q(v_s)}, \qquad v_s\sim r\propto p^\tau,\quad w=\frac pr",
    ),
    reads=frozenset({Signal.STUDENT_LOGITS, Signal.TEACHER_LOGITS}),
    traits=frozenset({Trait.SHIFT_INVARIANT}),
)


@hookimpl
def dpkd_losses() -> list[LossSpec]:
    return [SPEC]
