"""GKD's generalized Jensen-Shannon divergence (Agarwal et al., 2306.13649): between forward and reverse KL.

`β KL(p‖m) + (1-β) KL(q‖m)`, m = β p + (1-β) q. Divided by β it tends to KL(p‖q) as β → 0, and divided by 1-β to
KL(q‖p) as β → 1. At exactly 0 and 1, where the formula is 0, the loss is that KL: TRL's convention.
"""

from __future__ import annotations

from torch import Tensor

from dpkd.api import Card, LossConfig, LossSpec, Signal, TokenInputs, TokenLoss, Trait, hookimpl, setting
from dpkd.functional import KLSum, jensen_shannon, kl
from dpkd_zoo.papers import GKD, TRL, at


class JSDConfig(LossConfig):
    """Place between the two KLs, scale, temperature."""

    beta: float = setting(
        0.5,
        description="β: share of the teacher in the mixture m; 0 is forward KL, 1 reverse KL",
        source="TRL's GKDConfig; the paper tries 0.1, 0.5, 0.9",
        ge=0,
        le=1,
    )
    rescale: bool = setting(
        False,
        description="divide by β(1-β), so that the value tends to the KLs at both ends",
        source="not in the paper: for β on a schedule, or to compare values of different β",
    )
    temperature: float = setting(1.0, description="divides both models' logits", source="TRL: 1.0", gt=0)


class JSDLoss(TokenLoss[JSDConfig]):
    """`β KL(p‖m) + (1-β) KL(q‖m)`; a KL at the ends."""

    def forward(self, x: TokenInputs) -> Tensor:
        c = self.config
        log_p_NV, log_q_NV = x.teacher_log_probs(c.temperature), x.student_log_probs(c.temperature)
        if c.beta == 0:
            return kl(log_p_NV, log_q_NV)
        if c.beta == 1:
            return kl(log_q_NV, log_p_NV)
        value_N = jensen_shannon(log_p_NV, log_q_NV, c.beta)
        return value_N / (c.beta * (1 - c.beta)) if c.rescale else value_N

    def kl_sum(self) -> KLSum:
        c = self.config
        if c.beta in (0.0, 1.0):
            return KLSum(forward=1.0 - c.beta, reverse=c.beta, temperature=c.temperature)
        scale = 1 / (c.beta * (1 - c.beta)) if c.rescale else 1.0
        return KLSum(
            forward=scale * c.beta,
            reverse=scale * (1 - c.beta),
            forward_share=c.beta,
            reverse_share=c.beta,
            temperature=c.temperature,
        )


SPEC = LossSpec(
    name="jsd",
    loss=JSDLoss,
    config=JSDConfig,
    card=Card(
        title="Generalized Jensen-Shannon divergence",
        summary="A bounded divergence between forward (β → 0) and reverse KL (β → 1).",
        formula="β·KL(p‖m) + (1-β)·KL(q‖m),  m = β·p + (1-β)·q;  β = 0: KL(p‖q),  β = 1: KL(q‖p)",
        sources=(at(GKD, "Eq. 1, as numbered in TRL's code: D_JSD(β)"), at(TRL, "GKDTrainer.generalized_jsd_loss")),
        use_when="Neither mode covering nor mode seeking alone is right, or outliers make a KL explode: it is at most "
        "ln 2.",
        avoid_when="β is close to 0 or 1 without rescale=true: the value, and so the gradient, shrinks with β(1-β).",
        notes="The value jumps at exactly β = 0 and 1, where TRL's convention takes the full KL (a limit only after "
        "division by β or 1-β): rescale=true removes the jumps. gkd and speculative-kd are this loss on other text. "
        "Toolkits do not agree on β: DistiLLM's code calls the share of q lam, so its lam = 0.9 is β = 0.1 here; "
        "early TRL had m the other way round. The loss itself takes about 2.6 times kd's time. Finite where either "
        "model excludes a token, except at β = 0 and 1.",
        latex=r"\beta\,\mathrm{KL}(p\,\|\,m)+(1-\beta)\,\mathrm{KL}(q\,\|\,m), \qquad m=\beta p+(1-\beta)q",
    ),
    reads=frozenset({Signal.STUDENT_LOGITS, Signal.TEACHER_LOGITS}),
    traits=frozenset({Trait.ZERO_AT_MATCH, Trait.NON_NEGATIVE, Trait.SHIFT_INVARIANT}),
)


@hookimpl
def dpkd_losses() -> list[LossSpec]:
    return [SPEC]
