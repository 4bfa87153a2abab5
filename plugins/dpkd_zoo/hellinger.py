"""Squared Hellinger distance at every position: the α-β divergence at (½, ½), up to a factor of 4."""

from __future__ import annotations

from torch import Tensor

from dpkd.api import Card, LossConfig, LossSpec, Signal, TokenInputs, TokenLoss, Trait, hookimpl, setting
from dpkd_zoo.papers import ABKD, at


class HellingerConfig(LossConfig):
    """Temperature only."""

    temperature: float = setting(1.0, description="divides both models' logits", source="our choice: none", gt=0)


class HellingerLoss(TokenLoss[HellingerConfig]):
    """`½ Σ_v (√p(v) - √q(v))²`."""

    def forward(self, x: TokenInputs) -> Tensor:
        root_p_NV = (0.5 * x.teacher_log_probs(self.config.temperature)).exp()
        root_q_NV = (0.5 * x.student_log_probs(self.config.temperature)).exp()
        return 0.5 * (root_p_NV - root_q_NV).square().sum(-1)


SPEC = LossSpec(
    name="hellinger",
    loss=HellingerLoss,
    config=HellingerConfig,
    card=Card(
        title="Squared Hellinger distance",
        summary="Half the squared distance of √p and √q: symmetric, smooth, and never above 1.",
        formula="½·Σᵥ (√p(v) - √q(v))² = 1 - Σᵥ √(p(v)·q(v))",
        sources=(at(ABKD, "the α-β divergence at α = β = ½"),),
        use_when="You want a bounded, symmetric divergence that, unlike tvd, is smooth where the models agree.",
        avoid_when="The student is far from the teacher: the gradient fades with √q where it has no mass.",
        notes="No paper on language-model distillation proposes it alone; ABKD has it as one point of its family: its "
        "value at (½, ½) is 4 times this. It is the square of the distance, as usual for training: the root has no "
        "gradient where the models agree. The loss itself takes about 0.9 times kd's time.",
        latex=r"\tfrac12\sum_v\big(\sqrt{p(v)}-\sqrt{q(v)}\big)^2=1-\sum_v\sqrt{p(v)\,q(v)}",
    ),
    reads=frozenset({Signal.STUDENT_LOGITS, Signal.TEACHER_LOGITS}),
    traits=frozenset({Trait.ZERO_AT_MATCH, Trait.NON_NEGATIVE, Trait.SHIFT_INVARIANT}),
)


@hookimpl
def dpkd_losses() -> list[LossSpec]:
    return [SPEC]
