"""Skew reverse KL (Ko et al., DistiLLM, 2402.03898): reverse KL to a teacher with a little of the student mixed in.

`KL(q ‖ (1-α) p + α q)`: never above -log α, so a token that the teacher excludes has a finite cost.
"""

from __future__ import annotations

from torch import Tensor

from dpkd.api import Card, LossConfig, LossSpec, Signal, TokenInputs, TokenLoss, Trait, hookimpl, setting
from dpkd.functional import KLSum, kl, log_mix
from dpkd_zoo.papers import DISTILLM, at


class SRKLConfig(LossConfig):
    """How much of the student is mixed in."""

    skew: float = setting(
        0.1,
        description="α: share of the student in the mixture; 0 is reverse KL",
        source="DistiLLM §3; released --skew-alpha",
        ge=0,
        lt=1,
    )


class SRKLLoss(TokenLoss[SRKLConfig]):
    """`KL(q ‖ (1-α) p + α q)`, with the gradient through both places of q."""

    def forward(self, x: TokenInputs) -> Tensor:
        log_q_NV = x.student_log_probs()
        return kl(log_q_NV, log_mix(log_q_NV, x.teacher_log_probs(), self.config.skew))

    def kl_sum(self) -> KLSum:
        return KLSum(reverse=1.0, reverse_share=1.0 - self.config.skew)


SPEC = LossSpec(
    name="srkl",
    loss=SRKLLoss,
    config=SRKLConfig,
    card=Card(
        title="Skew reverse KL",
        summary="Reverse KL to a mixture of teacher and student: mode seeking, but bounded.",
        formula="Σᵥ q(v)·log(q(v)/m(v)),  m = (1-α)·p + α·q",
        sources=(at(DISTILLM, "§3, skew KL; losses.py, skewed_reverse_kl"),),
        use_when="You want reverse KL, on any text: tokens that the teacher excludes cannot blow it up.",
        avoid_when="Diversity matters: it is still mode seeking.",
        notes="Between 0 and -log α (2.3 nats at 0.1). The gradient flows through the q in the mixture too, as in the "
        "paper's formula; DistiLLM-2's code detaches it there. The loss itself takes about 1.9 times kd's time.",
        latex=r"\sum_v q(v)\log\frac{q(v)}{m(v)}, \qquad m=(1-\alpha)p+\alpha q",
    ),
    reads=frozenset({Signal.STUDENT_LOGITS, Signal.TEACHER_LOGITS}),
    traits=frozenset({Trait.ZERO_AT_MATCH, Trait.NON_NEGATIVE, Trait.SHIFT_INVARIANT}),
)


@hookimpl
def dpkd_losses() -> list[LossSpec]:
    return [SPEC]
