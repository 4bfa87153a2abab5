"""The α-β divergence (ABKD, Wang et al., 2505.04560): one family from forward to reverse KL and beyond.

`-1/(αβ) Σ_v [p^α q^β - α/(α+β) p^(α+β) - β/(α+β) q^(α+β)]`, with its limits where α, β or α+β is 0. (1, 0) is KL(p‖q),
(0, 1) is KL(q‖p), (1, 1) is ½‖p-q‖², (½, ½) is 4 times the squared Hellinger distance.
"""

from __future__ import annotations

import math

from pydantic import model_validator
from torch import Tensor

from dpkd.api import Card, LossConfig, LossSpec, Signal, TokenInputs, TokenLoss, Trait, hookimpl, setting
from dpkd_zoo.papers import ABKD, at

# Below it 1/α amplifies the rounding of float32 more than the limit differs from the value.
NEAR_ZERO = 1e-3


class AlphaBetaConfig(LossConfig):
    """The two exponents."""

    alpha: float = setting(
        0.2,
        description="α: exponent of the teacher; large: only its likely tokens count",
        source="ABKD's GPT-2 scripts (α = 0.2, α+β = 0.9)",
        ge=-2,
        le=2,
    )
    beta: float = setting(
        0.7, description="β: exponent of the student", source="ABKD's GPT-2 scripts (α = 0.2, α+β = 0.9)", ge=-2, le=2
    )

    @model_validator(mode="after")
    def _sum_is_not_negative(self) -> AlphaBetaConfig:
        if self.alpha + self.beta < -NEAR_ZERO:
            raise ValueError(f"α+β should be at least 0, got {self.alpha} + {self.beta}")
        return self


def _one_zero(log_a_NV: Tensor, log_b_NV: Tensor, alpha: float) -> Tensor:
    """β = 0: `1/α² Σ [a^α log(a^α/b^α) - a^α + b^α]`."""
    a_NV = (alpha * log_a_NV).exp()
    gap_NV = (log_a_NV - log_b_NV).masked_fill(a_NV == 0, 0.0)
    return (alpha * a_NV * gap_NV - a_NV + (alpha * log_b_NV).exp()).sum(-1) / alpha**2


def _opposite(log_p_NV: Tensor, log_q_NV: Tensor, alpha: float) -> Tensor:
    """α + β = 0: `1/α² Σ [log(q^α/p^α) + (p/q)^α - 1]`."""
    power_NV = alpha * (log_p_NV - log_q_NV)
    return (power_NV.expm1() - power_NV).masked_fill(power_NV.isinf(), math.inf).sum(-1) / alpha**2


def alpha_beta(log_p_NV: Tensor, log_q_NV: Tensor, alpha: float, beta: float) -> Tensor:
    """The divergence `[N]` from log-probabilities `[N, V]`; exponents within 1e-3 of a limit are at the limit."""
    # A token that both exclude counts nothing: p = q = 1 is as good, and has no power that is infinite.
    nowhere_NV = (log_p_NV == -math.inf) & (log_q_NV == -math.inf)
    log_p_NV, log_q_NV = log_p_NV.masked_fill(nowhere_NV, 0.0), log_q_NV.masked_fill(nowhere_NV, 0.0)
    if abs(alpha) < NEAR_ZERO and abs(beta) < NEAR_ZERO:
        return 0.5 * (log_q_NV - log_p_NV).square().sum(-1)
    if abs(beta) < NEAR_ZERO:
        return _one_zero(log_p_NV, log_q_NV, alpha)
    if abs(alpha) < NEAR_ZERO:
        return _one_zero(log_q_NV, log_p_NV, beta)
    total = alpha + beta
    if abs(total) < NEAR_ZERO:
        return _opposite(log_p_NV, log_q_NV, alpha)
    # Grouped so that both brackets are 0, not merely their sum, where the models agree; only mixed may be infinite.
    mixed_NV = (alpha * log_p_NV + beta * log_q_NV).exp()
    teacher_NV, student_NV = (total * log_p_NV).exp(), (total * log_q_NV).exp()
    return ((teacher_NV - mixed_NV) + (beta / total) * (student_NV - teacher_NV)).sum(-1) / (alpha * beta)


class AlphaBetaLoss(TokenLoss[AlphaBetaConfig]):
    """`-1/(αβ) Σ_v [p^α q^β - α/(α+β) p^(α+β) - β/(α+β) q^(α+β)]`."""

    def forward(self, x: TokenInputs) -> Tensor:
        return alpha_beta(x.teacher_log_probs(), x.student_log_probs(), self.config.alpha, self.config.beta)


SPEC = LossSpec(
    name="alpha-beta",
    loss=AlphaBetaLoss,
    config=AlphaBetaConfig,
    card=Card(
        title="ABKD's α-β divergence",
        summary="One family with forward KL, reverse KL, Hellinger and squared distance as special cases.",
        formula="-1/(αβ)·Σᵥ [p(v)^α·q(v)^β - α/(α+β)·p(v)^(α+β) - β/(α+β)·q(v)^(α+β)]",
        sources=(at(ABKD, "the definition of the α-β divergence; losses.py, ab_div"),),
        use_when="You can afford a search: α sets how much the teacher's likely tokens count, β the student's.",
        avoid_when="You do not want exponents to tune: use gkd, skl or akl. With a negative exponent, or α = β = 0, "
        "rare tokens dominate, and the value may be infinite.",
        notes="(1, 0) is fkl, (0, 1) rkl, (½, ½) 4 times hellinger. At α, β or α+β within 1e-3 of 0 the limit is "
        "used; all are continuous here. The released code has 1/α instead of 1/α² at the limits (equal only at α = "
        "1), and one of its scripts loops over α = 0, β = 1, which is plain reverse KL. The paper adds cross-entropy "
        "(terms.lm), the script a language-model term on plain text (terms.pretrain). The loss itself takes about 2 "
        "times kd's time. Infinite where a model excludes a token (a logit of -inf) to which a negative exponent or a "
        "logarithm applies.",
        latex=r"-\frac{1}{\alpha\beta}\sum_v\Big[p(v)^\alpha q(v)^\beta-\frac{\alpha}{\alpha+\beta}"
        r"\,p(v)^{\alpha+\beta}-\frac{\beta}{\alpha+\beta}\,q(v)^{\alpha+\beta}\Big]",
    ),
    reads=frozenset({Signal.STUDENT_LOGITS, Signal.TEACHER_LOGITS}),
    traits=frozenset({Trait.ZERO_AT_MATCH, Trait.NON_NEGATIVE, Trait.SHIFT_INVARIANT}),
)


@hookimpl
def dpkd_losses() -> list[LossSpec]:
    return [SPEC]
