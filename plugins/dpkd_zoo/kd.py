"""Word-level knowledge distillation: forward KL to the teacher at every position, mixed with cross-entropy.

Hinton et al. (2015), in the form that MiniLLM's and DPKD's baselines use: `(1-α) CE + α KL(p‖q)`, α = 0.5.
"""

from __future__ import annotations

from torch import Tensor

from dpkd.api import Card, LossConfig, LossSpec, Signal, TokenInputs, TokenLoss, Trait, hookimpl, setting
from dpkd.functional import KLSum, kl, nll
from dpkd_zoo.papers import HINTON, LMOPS, at


class KDConfig(LossConfig):
    """Mixture and temperature."""

    kd_ratio: float = setting(
        0.5,
        description="α: share of the KL term; the rest is cross-entropy on the response",
        source="MiniLLM's scripts/gpt2/kd (DistiLLM's re-implementation uses 1.0)",
        gt=0,
        le=1,
    )
    temperature: float = setting(
        1.0, description="divides both models' logits in the KL term", source="MiniLLM's finetune.py: none", gt=0
    )
    scale_by_t2: bool = setting(
        False,
        description="multiply the KL term by temperature², so that its gradient keeps its scale",
        source="off in the released code; on in Hinton et al.",
    )


class KDLoss(TokenLoss[KDConfig]):
    """`(1-α) · -log q(y_i) + α · KL(p‖q)`."""

    def forward(self, x: TokenInputs) -> Tensor:
        c = self.config
        if c.kd_ratio == 0:  # refused for `kd`, where a teacher would be loaded for nothing; `seqkd` has it
            return nll(x.student_log_probs(), x.targets)
        divergence_N = x.part("kl", kl(x.teacher_log_probs(c.temperature), x.student_log_probs(c.temperature)))
        if c.scale_by_t2:
            divergence_N = divergence_N * c.temperature**2
        if c.kd_ratio == 1.0:
            return divergence_N
        likelihood_N = x.part("nll", nll(x.student_log_probs(), x.targets))
        return (1 - c.kd_ratio) * likelihood_N + c.kd_ratio * divergence_N

    def kl_sum(self) -> KLSum | None:
        c = self.config
        if c.kd_ratio < 1 and c.temperature != 1:
            return None  # two temperatures
        scale = c.temperature**2 if c.scale_by_t2 else 1.0
        parts = ("kl" if c.kd_ratio else None, None, "nll" if c.kd_ratio else None)  # one term alone is the loss
        return KLSum(forward=scale * c.kd_ratio, likelihood=1 - c.kd_ratio, temperature=c.temperature, parts=parts)


def _reads(config: KDConfig) -> frozenset[Signal]:
    teacher = {Signal.TEACHER_LOGITS} if config.kd_ratio > 0 else set()
    targets = {Signal.TARGETS} if config.kd_ratio < 1 else set()
    return frozenset({Signal.STUDENT_LOGITS, *teacher, *targets})


SPEC = LossSpec(
    name="kd",
    loss=KDLoss,
    config=KDConfig,
    card=Card(
        title="Word-level knowledge distillation",
        summary="Forward KL to the teacher at every position, mixed with cross-entropy.",
        formula="(1-α)·(-log q(yᵢ)) + α·Σᵥ p(v)·log(p(v)/q(v))",
        sources=(at(HINTON, "§2"), at(LMOPS, "finetune.py, scripts/gpt2/kd")),
        use_when="The first thing to try: fast, stable, works off-policy on any data set.",
        avoid_when="The student is far too small to cover the teacher: forward KL then spreads its mass over tokens "
        "that it cannot tell apart; try rkl, akl, or text written by the student.",
        notes="The value is a true KL, 0 where the models agree. Released code computes the soft cross-entropy -Σ p "
        "log q, which has the same gradient and differs by the teacher's entropy.",
        latex=r"(1-\alpha)\,\big(-\log q(y_i)\big)+\alpha\sum_v p(v)\log\frac{p(v)}{q(v)}",
    ),
    reads=_reads,
    traits=frozenset({Trait.NON_NEGATIVE, Trait.SHIFT_INVARIANT, Trait.LINEAR_IN_TEACHER}),
    linear_when=lambda config: config.temperature == 1,  # samples are drawn from the teacher at temperature 1
)


@hookimpl
def dpkd_losses() -> list[LossSpec]:
    return [SPEC]
