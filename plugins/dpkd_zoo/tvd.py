"""Total variation distance at every position (Wen et al., f-distill, 2307.15190): half the summed gap |p - q|."""

from __future__ import annotations

from torch import Tensor

from dpkd.api import Card, LossConfig, LossSpec, Signal, TokenInputs, TokenLoss, Trait, hookimpl, setting
from dpkd_zoo.papers import DISTILLM, FDISTILL, at


class TVDConfig(LossConfig):
    """Temperature only."""

    temperature: float = setting(1.0, description="divides both models' logits", source="the paper: none", gt=0)


class TVDLoss(TokenLoss[TVDConfig]):
    """`½ Σ_v |p(v) - q(v)|`; where p(v) = q(v) exactly, the gradient of that token is 0."""

    def forward(self, x: TokenInputs) -> Tensor:
        p_NV = x.teacher_log_probs(self.config.temperature).exp()
        return 0.5 * (p_NV - x.student_log_probs(self.config.temperature).exp()).abs().sum(-1)


SPEC = LossSpec(
    name="tvd",
    loss=TVDLoss,
    config=TVDConfig,
    card=Card(
        title="Total variation distance",
        summary="Half the summed gap |p - q|: symmetric, and never above 1.",
        formula="½·Σᵥ |p(v) - q(v)|",
        sources=(
            at(
                FDISTILL,
                "Eq. 9: whole sequences; Eq. 10: the bound by steps; released code MANGA-UOFA/fdistill, dart/kd.py, "
                "calc_tvd_loss",
            ),
            at(DISTILLM, "losses.py, tv_distance"),
        ),
        use_when="The data or the teacher is noisy: no token can cost more than its own mass. It bounds how often two "
        "samplers differ, which decides the speed of speculative decoding.",
        avoid_when="Student and teacher are far apart: the gradient is almost 0 where q has no mass. Start from SFT.",
        notes="A bound on f-distill's sequence-level TVD, not equal to it; the paper uses it on text by teacher and "
        "student both (text.source=mixed). Not differentiable where p = q; there the gradient is taken to be 0. The "
        "loss itself takes about 0.7 times kd's time.",
        latex=r"\tfrac12\sum_v|p(v)-q(v)|",
    ),
    reads=frozenset({Signal.STUDENT_LOGITS, Signal.TEACHER_LOGITS}),
    traits=frozenset({Trait.ZERO_AT_MATCH, Trait.NON_NEGATIVE, Trait.SHIFT_INVARIANT}),
)


@hookimpl
def dpkd_losses() -> list[LossSpec]:
    return [SPEC]
