"""Forward KL over the whole vocabulary, at every position: `kd` without its cross-entropy.

Hinton et al. (2015), the soft part alone; in the LLM literature FKL, or plain "KD".
"""

from __future__ import annotations

from torch import Tensor

from dpkd.api import Card, LossConfig, LossSpec, Signal, TokenInputs, TokenLoss, Trait, hookimpl, setting
from dpkd.functional import KLSum, kl
from dpkd_zoo.papers import AKL, HINTON, at


class FKLConfig(LossConfig):
    """Temperature, and Hinton's correction for it."""

    temperature: float = setting(1.0, description="divides both models' logits", source="AKL's experiments: none", gt=0)
    scale_by_t2: bool = setting(
        False,
        description="multiply by temperature², so that the gradient keeps its scale",
        source="on in Hinton et al. §2; does nothing at temperature 1",
    )


class FKLLoss(TokenLoss[FKLConfig]):
    """`KL(p‖q) = Σ_v p(v) log(p(v)/q(v))`."""

    def forward(self, x: TokenInputs) -> Tensor:
        c = self.config
        value_N = kl(x.teacher_log_probs(c.temperature), x.student_log_probs(c.temperature))
        return value_N * c.temperature**2 if c.scale_by_t2 else value_N

    def kl_sum(self) -> KLSum:
        c = self.config
        return KLSum(forward=c.temperature**2 if c.scale_by_t2 else 1.0, temperature=c.temperature)


SPEC = LossSpec(
    name="fkl",
    loss=FKLLoss,
    config=FKLConfig,
    card=Card(
        title="Forward KL",
        summary="Full-vocabulary KL(p‖q) alone: the student covers everything that the teacher finds likely.",
        formula="Σᵥ p(v)·log(p(v)/q(v))",
        sources=(at(HINTON, "§2"), at(AKL, "§3")),
        use_when="You want the pure divergence, as a baseline or beside other terms; kd adds cross-entropy.",
        avoid_when="The student is far too small to cover the teacher: it spreads its mass; try rkl, skl or jsd.",
        notes="The same as kd with kd_ratio=1, at the same cost. Other toolkits log the soft cross-entropy -Σ p log "
        "q: equal gradients, but the value includes the teacher's entropy. Infinite where the student excludes a "
        "token (a logit of -inf) that the teacher does not.",
        latex=r"\sum_v p(v)\log\frac{p(v)}{q(v)}",
    ),
    reads=frozenset({Signal.STUDENT_LOGITS, Signal.TEACHER_LOGITS}),
    traits=frozenset({Trait.ZERO_AT_MATCH, Trait.NON_NEGATIVE, Trait.SHIFT_INVARIANT, Trait.LINEAR_IN_TEACHER}),
    linear_when=lambda config: config.temperature == 1,  # samples are drawn from the teacher at temperature 1
)


@hookimpl
def dpkd_losses() -> list[LossSpec]:
    return [SPEC]
