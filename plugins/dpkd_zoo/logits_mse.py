"""Squared difference of logits (Ba & Caruana, 1312.6184), each model's centered on its mean over the vocabulary.

Centered, it is the limit of T²·KL at high temperature (Hinton et al., Eq. 4), and a constant added to all logits of a
model, which changes no probability, costs nothing.
"""

from __future__ import annotations

import math

from torch import Tensor

from dpkd.api import Card, LossConfig, LossSpec, Signal, TokenInputs, TokenLoss, Trait, hookimpl
from dpkd_zoo.papers import BA_CARUANA, HINTON, KIM_MSE, at


class LogitsMSEConfig(LossConfig):
    """No settings."""


class LogitsMSELoss(TokenLoss[LogitsMSEConfig]):
    """`1/(2V) Σ_v (d(v) - mean d)²`, d = z_q - z_p: half the variance of the difference of logits."""

    def forward(self, x: TokenInputs) -> Tensor:
        student_NV, teacher_NV = x.student_logits, x.teacher_logits
        outside_q_NV, outside_p_NV = student_NV == -math.inf, teacher_NV == -math.inf
        left_out_NV = outside_q_NV | outside_p_NV
        gap_NV = (student_NV - teacher_NV).masked_fill(left_out_NV, 0.0)
        count_N1 = (~left_out_NV).sum(-1, keepdim=True).clamp(min=1)
        centered_NV = (gap_NV - gap_NV.sum(-1, keepdim=True) / count_N1).masked_fill(left_out_NV, 0.0)
        value_N = 0.5 * (centered_NV.square() / count_N1).sum(-1)
        return value_N.masked_fill((outside_q_NV != outside_p_NV).any(-1), math.inf)


SPEC = LossSpec(
    name="logits-mse",
    loss=LogitsMSELoss,
    config=LogitsMSEConfig,
    card=Card(
        title="Squared difference of centered logits",
        summary="Half the mean squared difference of the models' centered logits: every token counts the same.",
        formula="1/(2V)·Σᵥ (z̃_q(v) - z̃_p(v))²,  z̃ = z - mean of z over the vocabulary",
        sources=(
            at(
                BA_CARUANA,
                "regression on logits, not centered; as in AberHu/Knowledge-Distillation-Zoo, kd_losses/logits.py",
            ),
            at(HINTON, "§2.1, Eq. 4: the limit of high temperature"),
            at(KIM_MSE, "MSE against KL"),
        ),
        use_when="The vocabulary is small, or the student is large enough to copy the teacher's logits altogether.",
        avoid_when="The vocabulary is large: tens of thousands of tokens that are never generated outweigh the likely "
        "ones.",
        notes="The value is in squared logits, not in nats: weigh it accordingly beside other terms. Other toolkits "
        "do not center, and then fit a constant that no probability depends on. The factor ½ makes it the limit of "
        "fkl with scale_by_t2=true as the temperature grows. The loss itself takes about 1.4 times kd's time. Tokens "
        "that both models exclude are left out; infinite where only one of the models excludes a token.",
        latex=r"\frac{1}{2V}\sum_v\big(\tilde z_q(v)-\tilde z_p(v)\big)^2, \qquad \tilde z=z-\frac1V\sum_v z(v)",
    ),
    reads=frozenset({Signal.STUDENT_LOGITS, Signal.TEACHER_LOGITS}),
    traits=frozenset({Trait.ZERO_AT_MATCH, Trait.NON_NEGATIVE, Trait.SHIFT_INVARIANT}),
)


@hookimpl
def dpkd_losses() -> list[LossSpec]:
    return [SPEC]
