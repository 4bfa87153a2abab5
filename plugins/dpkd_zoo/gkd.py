"""Generalised knowledge distillation (Agarwal et al., 2306.13649): a JSD on text half by the student.

The objective is that of `jsd`; what makes it GKD is the text: with probability λ a step trains on responses that the
student has just written, else on the data set, without gradient through the sampling.
"""

from __future__ import annotations

from torch import Tensor

from dpkd.api import Card, LossConfig, LossSpec, Signal, TokenInputs, TokenLoss, Trait, hookimpl, setting
from dpkd.functional import KLSum, jensen_shannon, kl
from dpkd_zoo.papers import GKD, TRL, at


class GKDConfig(LossConfig):
    """The divergence; λ is the student's share in `text.mix`."""

    beta: float = setting(
        0.5,
        description="β: share of the teacher in the mixture m; 0 is forward KL, 1 reverse KL",
        source="TRL's GKDConfig; the paper tries 0.1, 0.5, 0.9",
        ge=0,
        le=1,
    )


class GKDLoss(TokenLoss[GKDConfig]):
    """`β KL(p‖m) + (1-β) KL(q‖m)` with `m = β p + (1-β) q`; a KL at the ends."""

    def forward(self, x: TokenInputs) -> Tensor:
        beta, log_p_NV, log_q_NV = self.config.beta, x.teacher_log_probs(), x.student_log_probs()
        if beta == 0:
            return kl(log_p_NV, log_q_NV)
        if beta == 1:
            return kl(log_q_NV, log_p_NV)
        return jensen_shannon(log_p_NV, log_q_NV, beta)

    def kl_sum(self) -> KLSum:
        """The same, for fused kernels."""
        beta = self.config.beta
        if beta in (0.0, 1.0):
            return KLSum(forward=1.0 - beta, reverse=beta)
        return KLSum(forward=beta, reverse=1 - beta, forward_share=beta, reverse_share=beta)


SPEC = LossSpec(
    name="gkd",
    loss=GKDLoss,
    config=GKDConfig,
    card=Card(
        title="Generalised knowledge distillation",
        summary="Generalised JSD on text that the student and the data set write in turn.",
        formula="(1-λ)·E_{y~data}[D(p‖q)] + λ·E_{y~q}[D(p‖q)],  D = β·KL(p‖m) + (1-β)·KL(q‖m),  m = β·p + (1-β)·q",
        sources=(at(GKD, "§3, Algorithm 1 (numbers from memory)"), at(TRL, "GKDTrainer")),
        use_when="The student can already write (start from SFT) and will be used to generate: it learns from its own "
        "mistakes.",
        avoid_when="Sampling is too slow, or the student writes nonsense yet: jsd is the same objective on given text.",
        notes="λ is text.mix.student (0.5 here, as in TRL; the paper tries 0, 0.5, 1), drawn once per step. At β = 0 "
        "and 1 the loss is the KL itself, as in TRL (see jsd). TRL samples at temperature 0.9 "
        "(text.sampling.temperature), 128 new tokens, and trains with dropout off. The loss itself takes about "
        "2.6 times kd's time; the sampling of every student step costs far more.",
    ),
    reads=frozenset({Signal.STUDENT_LOGITS, Signal.TEACHER_LOGITS}),
    suggests={"text": {"source": "mixed", "mix": {"dataset": 0.5, "student": 0.5}}},
    traits=frozenset({Trait.ZERO_AT_MATCH, Trait.NON_NEGATIVE, Trait.SHIFT_INVARIANT}),
)


@hookimpl
def dpkd_losses() -> list[LossSpec]:
    """This module's loss."""
    return [SPEC]
