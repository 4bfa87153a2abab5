"""Speculative knowledge distillation (Xu et al., 2410.11325): a divergence on text that both models write together.

The student proposes each token; where the proposal is not among the teacher's K likeliest, the teacher draws one in its
place. Early on most tokens are the teacher's, later the student's own. The objective is a plain divergence; what makes
it SKD is the text (`text.teacher_veto`).
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from dpkd.api import Card, LossConfig, LossSpec, Signal, TokenInputs, TokenLoss, Trait, hookimpl, setting
from dpkd.functional import KLSum, jensen_shannon, kl
from dpkd_zoo.papers import SPECULATIVE_KD, at


class SpeculativeKDConfig(LossConfig):
    """The divergence; K is `text.teacher_veto`."""

    divergence: Literal["fkl", "rkl", "jsd"] = setting(
        "fkl",
        description="forward KL, reverse KL, or the Jensen-Shannon divergence with equal halves",
        source="SKD Algorithm 1 leaves D open and writes D(p‖q)",
    )


class SpeculativeKDLoss(TokenLoss[SpeculativeKDConfig]):
    """`KL(p‖q)`, `KL(q‖p)` or `JSD(p, q)`."""

    def forward(self, x: TokenInputs) -> Tensor:
        log_p_NV, log_q_NV = x.teacher_log_probs(), x.student_log_probs()
        if self.config.divergence == "fkl":
            return kl(log_p_NV, log_q_NV)
        if self.config.divergence == "rkl":
            return kl(log_q_NV, log_p_NV)
        return jensen_shannon(log_p_NV, log_q_NV, 0.5)

    def kl_sum(self) -> KLSum:
        """The same, for fused kernels."""
        if self.config.divergence == "jsd":
            return KLSum(forward=0.5, reverse=0.5, forward_share=0.5, reverse_share=0.5)
        return KLSum(forward=1.0) if self.config.divergence == "fkl" else KLSum(reverse=1.0)


SPEC = LossSpec(
    name="speculative-kd",
    loss=SpeculativeKDLoss,
    config=SpeculativeKDConfig,
    card=Card(
        title="Speculative knowledge distillation",
        summary="A divergence on text that the student proposes, and the teacher corrects token by token.",
        formula="E_{y~π}[D(p‖q)],  π(v) = q(v)·[v ∈ top-K of p] + p(v)·Σ_{u ∉ top-K of p} q(u)",
        sources=(at(SPECULATIVE_KD, "Algorithm 1"),),
        use_when="The student is too weak for its own text, which the teacher would judge badly, and still shall learn "
        "from its own mistakes: gkd or rkl on student text go wrong at first.",
        avoid_when="There is no time to sample with both models at every step; or the student already writes as the "
        "teacher does, where the text is the student's own anyway.",
        notes="K is text.teacher_veto: 25 in the paper (from memory); 0 is on-policy distillation, 1 nearly the "
        "teacher's greedy text. The paper draws a few tokens ahead and has the teacher check them at once, which "
        "gives the same distribution; here both models write token by token, and π is drawn from in closed form. "
        "text.sampling filters both models, the teacher's K is of the unfiltered distribution. The loss is fkl, rkl "
        "or jsd on that text; the sampling runs the teacher for every token.",
    ),
    reads=frozenset({Signal.STUDENT_LOGITS, Signal.TEACHER_LOGITS}),
    suggests={"text": {"source": "student", "teacher_veto": 25}},
    traits=frozenset({Trait.ZERO_AT_MATCH, Trait.NON_NEGATIVE, Trait.SHIFT_INVARIANT}),
)


@hookimpl
def dpkd_losses() -> list[LossSpec]:
    """This module's loss."""
    return [SPEC]
