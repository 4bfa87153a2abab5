"""ToDi (Jung et al., 2505.16297): each token of the vocabulary chooses between forward and reverse KL.

Where the student is too low (p > q) the forward KL raises it, where it is too high the reverse KL lowers it. The
weight is a sigmoid of the log-ratio and has no gradient.
"""

from __future__ import annotations

import math

from torch import Tensor

from dpkd.api import Card, LossConfig, LossSpec, Signal, TokenInputs, TokenLoss, Trait, hookimpl, setting
from dpkd_zoo.papers import TODI, at


class ToDiConfig(LossConfig):
    """How sharp the choice is."""

    beta: float = setting(
        1.0,
        description="β: slope of the weight; 0 is (forward + reverse)/2, large is a hard choice",
        source="ToDi's released code: σ(log p/q), so 1",
        ge=0,
    )


class ToDiLoss(TokenLoss[ToDiConfig]):
    """`Σ_v [s p log(p/q) + (1-s) q log(q/p)]`, s = σ(β log(p/q)) without gradient."""

    def forward(self, x: TokenInputs) -> Tensor:
        log_p_NV, log_q_NV = x.teacher_log_probs(), x.student_log_probs()
        nowhere_NV = (log_p_NV == -math.inf) & (log_q_NV == -math.inf)
        gap_NV = (log_p_NV - log_q_NV).masked_fill(nowhere_NV, 0.0)
        if self.config.beta == 0:
            weight_NV = gap_NV.new_full((), 0.5)
        else:
            weight_NV = (self.config.beta * gap_NV.detach()).sigmoid()
        mass_NV = weight_NV * log_p_NV.exp() - (1 - weight_NV) * log_q_NV.exp()
        # Mass that rounds to 0 must not meet an infinite gap: 0 · inf is NaN.
        return (mass_NV * gap_NV.masked_fill(mass_NV == 0, 0.0)).sum(-1)


SPEC = LossSpec(
    name="todi",
    loss=ToDiLoss,
    config=ToDiConfig,
    card=Card(
        title="Token-wise distillation",
        summary="Forward or reverse KL, weighted for each token of the vocabulary by its log-ratio.",
        formula="Σᵥ [s·p·log(p/q) + (1-s)·q·log(q/p)],  s(v) = σ(β·log(p(v)/q(v))), no gradient through s",
        sources=(at(TODI, "released code jungseongryong/ToDi, code/criterions/various_divergence.py, compute_ToDi"),),
        use_when="Off-policy distillation where neither direction alone fits: underestimated tokens are lifted, "
        "overestimated ones suppressed.",
        avoid_when="Either model excludes tokens (infinite), or you want a plain baseline: symmetric-kl is β = 0.",
        notes="The summands of the divergence are mixed token by token, so it is not a mix of two divergences; still "
        "each summand is at least 0. akl weighs whole positions instead. The loss itself takes about 1.9 times kd's "
        "time. Infinite where only one of the models excludes a token (a logit of -inf).",
        latex=r"\sum_v\Big[s\,p\log\frac pq+(1-s)\,q\log\frac qp\Big], \qquad "
        r"s(v)=\sigma\Big(\beta\log\frac{p(v)}{q(v)}\Big)\text{ without gradient}",
    ),
    reads=frozenset({Signal.STUDENT_LOGITS, Signal.TEACHER_LOGITS}),
    traits=frozenset({Trait.ZERO_AT_MATCH, Trait.NON_NEGATIVE, Trait.SHIFT_INVARIANT, Trait.DETACHED_WEIGHTS}),
)


@hookimpl
def dpkd_losses() -> list[LossSpec]:
    return [SPEC]
