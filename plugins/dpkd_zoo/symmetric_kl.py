"""Forward and reverse KL with fixed weights: Jeffreys' divergence at one half, ABKD's baseline WSD in general."""

from __future__ import annotations

from torch import Tensor

from dpkd.api import Card, LossConfig, LossSpec, Signal, TokenInputs, TokenLoss, Trait, hookimpl, setting
from dpkd.functional import KLSum, kl
from dpkd_zoo.papers import ABKD, AKL, JEFFREYS, at


class SymmetricKLConfig(LossConfig):
    """The weight between the two directions, and a temperature."""

    reverse_weight: float = setting(
        0.5,
        description="λ: weight of the reverse KL; the forward KL has 1-λ",
        source="AKL's baseline FKL+RKL; ABKD's code, WSD",
        ge=0,
        le=1,
    )
    temperature: float = setting(1.0, description="divides both models' logits", source="AKL's experiments: none", gt=0)


class SymmetricKLLoss(TokenLoss[SymmetricKLConfig]):
    """`(1-λ) KL(p‖q) + λ KL(q‖p)`."""

    def forward(self, x: TokenInputs) -> Tensor:
        weight, temperature = self.config.reverse_weight, self.config.temperature
        log_p_NV, log_q_NV = x.teacher_log_probs(temperature), x.student_log_probs(temperature)
        # A direction without weight may be infinite, and 0 · inf is NaN.
        if weight == 0:
            return x.part("forward", kl(log_p_NV, log_q_NV))
        reverse_N = x.part("reverse", kl(log_q_NV, log_p_NV))
        if weight == 1:
            return reverse_N
        return (1 - weight) * x.part("forward", kl(log_p_NV, log_q_NV)) + weight * reverse_N

    def kl_sum(self) -> KLSum:
        weight, temperature = self.config.reverse_weight, self.config.temperature
        parts = ("forward", "reverse", None)
        return KLSum(forward=1 - weight, reverse=weight, temperature=temperature, parts=parts)


SPEC = LossSpec(
    name="symmetric-kl",
    loss=SymmetricKLLoss,
    config=SymmetricKLConfig,
    card=Card(
        title="Forward and reverse KL, weighted",
        summary="A fixed mix of mode covering and mode seeking.",
        formula="(1-λ)·KL(p‖q) + λ·KL(q‖p)",
        sources=(
            at(
                JEFFREYS,
                "the divergence named after it; λ = ½ as in tensorflow/probability, "
                "tensorflow_probability/python/vi/csiszar_divergence.py, jeffreys",
            ),
            at(AKL, "Table 1, FKL+RKL"),
            at(ABKD, "released code, WSD"),
        ),
        use_when="As the baseline of every adaptive mix (akl, todi), or with λ on a schedule from 0 to 1.",
        avoid_when="Either model excludes tokens: one direction is then infinite; jsd is bounded.",
        notes="Half of Jeffreys' divergence at λ = ½. ABKD calls it WSD. The loss itself takes about 1.7 times kd's "
        "time. Infinite where only one of the models excludes a token (a logit of -inf).",
        latex=r"(1-\lambda)\,\mathrm{KL}(p\|q)+\lambda\,\mathrm{KL}(q\|p)",
    ),
    reads=frozenset({Signal.STUDENT_LOGITS, Signal.TEACHER_LOGITS}),
    traits=frozenset({Trait.ZERO_AT_MATCH, Trait.NON_NEGATIVE, Trait.SHIFT_INVARIANT}),
)


@hookimpl
def dpkd_losses() -> list[LossSpec]:
    return [SPEC]
