"""Universal logit distillation: sorted probabilities are compared, so the two vocabularies need not be the same.

Boizard et al. (2402.12030): cross-entropy on the text, plus λ times the L1 distance between the two models'
probabilities in descending order (a Wasserstein distance under a cost that is the same for any two tokens).
"""

from __future__ import annotations

from torch import Tensor

from dpkd.api import Card, LossConfig, LossSpec, Signal, TokenInputs, TokenLoss, Trait, hookimpl, setting
from dpkd.functional import nll, sorted_distance
from dpkd_zoo.papers import TRL_GOLD, ULD, at


class ULDConfig(LossConfig):
    """The weights of the two parts, and a temperature."""

    uld_weight: float = setting(
        1.5,
        description="λ: weight of the distance between sorted probabilities",
        source="released configs/distillation.py: distil_factor (TRL: 1.0)",
        gt=0,
    )
    ce_weight: float = setting(
        1.0,
        description="weight of the cross-entropy on the text; 0: the distance alone",
        source="released configs/distillation.py: cross_entropy_factor (TRL: 0)",
        ge=0,
    )
    temperature: float = setting(
        1.0,
        description="divides both models' logits in the distance",
        source="released DistillationLoss and TRL: 1",
        gt=0,
    )


class ULDLoss(TokenLoss[ULDConfig]):
    """`-log q(text of the row) + λ · Σ_i |p_(i) - q_(i)|`."""

    def forward(self, x: TokenInputs) -> Tensor:
        c = self.config
        p_NV, q_NV = x.teacher_log_probs(c.temperature).exp(), x.student_log_probs(c.temperature).exp()
        value_N = c.uld_weight * x.part("uld", sorted_distance(p_NV, q_NV))
        if c.ce_weight == 0:
            return value_N
        return value_N + c.ce_weight * x.part("nll", nll(x.student_log_probs(), x.targets) - x.student_rest)


def _reads(config: ULDConfig) -> frozenset[Signal]:
    both = frozenset({Signal.STUDENT_LOGITS, Signal.TEACHER_LOGITS})
    return both if config.ce_weight == 0 else both | {Signal.TARGETS, Signal.STUDENT_REST}


SPEC = LossSpec(
    name="uld",
    loss=ULDLoss,
    config=ULDConfig,
    card=Card(
        title="Universal logit distillation",
        summary="Cross-entropy, and an L1 distance between sorted probabilities: for teachers with another tokenizer.",
        formula="-log q(text of the row) + λ·Σᵢ |p₍ᵢ₎ - q₍ᵢ₎|,  p₍ᵢ₎ the i-th largest probability",
        sources=(
            at(ULD, "released code Nicolas-BZRD/llm-recipes, models/distillation_model.py, DistillationLoss"),
            at(TRL_GOLD, "ULDLoss with use_extended_uld"),
        ),
        use_when="The only good teacher has another tokenizer, and the text is given (or written by the teacher).",
        avoid_when="Tokenizers are the same: kd says which token is likely, and sorting discards that. The distance "
        "alone (ce_weight=0) tells a student how certain to be, not of what.",
        notes="Where tokenizers differ, a row is a span of text that both delimit, and the distance is taken where "
        "both models have read the same text and predict how the span begins; the cross-entropy is that of the whole "
        "span. The paper pairs the t-th tokens of both responses instead and cuts the longer: after the first "
        "difference these are at different places of the text. The mean is over spans (paper and TRL: over tokens, per "
        "response). The end of a response is a span of its own (TRL and the released training script leave it out). A "
        "distance of sorted probabilities is at most 2. Cost: the k largest probabilities of each model per row, k the "
        "size of the smaller vocabulary, and the teacher's forward pass in its own tokens.",
        latex=r"-\log q(\text{text of the row})+\lambda\sum_i\big|p_{(i)}-q_{(i)}\big|, \qquad p_{(i)}\text{ the "
        r"}i\text{-th largest}",
    ),
    reads=_reads,
    traits=frozenset({Trait.NON_NEGATIVE, Trait.SHIFT_INVARIANT, Trait.ACROSS_TOKENIZERS}),
)


@hookimpl
def dpkd_losses() -> list[LossSpec]:
    return [SPEC]
