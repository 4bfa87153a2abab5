"""Reverse KL over the whole vocabulary, at every position of any text.

On the student's own text this is the single-step part of MiniLLM's gradient (Eq. 3), and on-policy distillation
without the long-range term.
"""

from __future__ import annotations

from torch import Tensor

from dpkd.api import Card, LossConfig, LossSpec, Signal, TokenInputs, TokenLoss, Trait, hookimpl, setting
from dpkd.functional import KLSum, kl
from dpkd_zoo.papers import AKL, MINILLM, at


class RKLConfig(LossConfig):
    """Temperature only."""

    temperature: float = setting(1.0, description="divides both models' logits", source="AKL's experiments: none", gt=0)


class RKLLoss(TokenLoss[RKLConfig]):
    """`KL(q‖p) = Σ_v q(v) log(q(v)/p(v))`."""

    def forward(self, x: TokenInputs) -> Tensor:
        temperature = self.config.temperature
        return kl(x.student_log_probs(temperature), x.teacher_log_probs(temperature))

    def kl_sum(self) -> KLSum:
        return KLSum(reverse=1.0, temperature=self.config.temperature)


SPEC = LossSpec(
    name="rkl",
    loss=RKLLoss,
    config=RKLConfig,
    card=Card(
        title="Reverse KL",
        summary="Full-vocabulary KL(q‖p): the student keeps to what the teacher finds likely.",
        formula="Σᵥ q(v)·log(q(v)/p(v))",
        sources=(at(MINILLM, "§2.1"), at(AKL, "§3")),
        use_when="The student is much smaller than the teacher, or writes the text itself (text.source=student).",
        avoid_when="Diversity matters: mode seeking narrows the student.",
        notes="The gradient flows through the probabilities of the vocabulary only, not through sampling. Infinite "
        "where the teacher excludes a token that the student does not (logits of -inf).",
        latex=r"\sum_v q(v)\log\frac{q(v)}{p(v)}",
    ),
    reads=frozenset({Signal.STUDENT_LOGITS, Signal.TEACHER_LOGITS}),
    traits=frozenset({Trait.ZERO_AT_MATCH, Trait.NON_NEGATIVE, Trait.SHIFT_INVARIANT}),
)


@hookimpl
def dpkd_losses() -> list[LossSpec]:
    return [SPEC]
