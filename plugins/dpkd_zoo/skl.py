"""Skew KL (Ko et al., DistiLLM, 2402.03898): forward KL to a student with a little of the teacher mixed in.

`KL(p ‖ α p + (1-α) q)`: never above -log α, so a token without mass under the student cannot blow it up.
"""

from __future__ import annotations

from torch import Tensor

from dpkd.api import Card, LossConfig, LossSpec, Signal, TokenInputs, TokenLoss, Trait, hookimpl, setting
from dpkd.functional import KLSum, kl, log_mix
from dpkd_zoo.papers import DISTILLM, at


class SKLConfig(LossConfig):
    """How much of the teacher is mixed in."""

    skew: float = setting(
        0.1,
        description="α: share of the teacher in the mixture; 0 is forward KL",
        source="DistiLLM §3; released --skew-alpha",
        ge=0,
        lt=1,
    )


class SKLLoss(TokenLoss[SKLConfig]):
    """`KL(p ‖ α p + (1-α) q)`."""

    def forward(self, x: TokenInputs) -> Tensor:
        log_p_NV = x.teacher_log_probs()
        return kl(log_p_NV, log_mix(log_p_NV, x.student_log_probs(), self.config.skew))

    def kl_sum(self) -> KLSum:
        return KLSum(forward=1.0, forward_share=self.config.skew)


SPEC = LossSpec(
    name="skl",
    loss=SKLLoss,
    config=SKLConfig,
    card=Card(
        title="Skew KL",
        summary="Forward KL to a mixture of teacher and student: bounded, with a smoother gradient.",
        formula="Σᵥ p(v)·log(p(v)/m(v)),  m = α·p + (1-α)·q",
        sources=(at(DISTILLM, "§3, skew KL; losses.py, skewed_forward_kl"),),
        use_when="You want forward KL, but its gradient is noisy: q is almost 0 at tokens that the teacher likes.",
        avoid_when="The student excludes nothing and is already close: forward KL is then the same and cheaper.",
        notes="Between 0 and -log α (2.3 nats at 0.1). The released code drops the teacher's entropy, so its values "
        "differ by it; gradients are the same. DistiLLM adds a language-model term of weight 1 on plain text "
        "(terms.pretrain) and its own choice of text: see distillm. The loss itself takes about 1.6 times kd's time.",
        latex=r"\sum_v p(v)\log\frac{p(v)}{m(v)}, \qquad m=\alpha p+(1-\alpha)q",
    ),
    reads=frozenset({Signal.STUDENT_LOGITS, Signal.TEACHER_LOGITS}),
    traits=frozenset({Trait.ZERO_AT_MATCH, Trait.NON_NEGATIVE, Trait.SHIFT_INVARIANT}),
)


@hookimpl
def dpkd_losses() -> list[LossSpec]:
    return [SPEC]
