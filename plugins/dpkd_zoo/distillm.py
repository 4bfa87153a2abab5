"""DistiLLM's objective (Ko et al., 2402.03898): a skew KL, on a fixed mix of data and student text.

The paper has two parts: the skew divergence, which is here whole, and an adaptive off-policy choice of text, which is
not: a probability of student text that rises when the validation loss does, and a replay buffer. In its place stands
a fixed share of student text, written anew every epoch.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from dpkd.api import Card, LossConfig, LossSpec, Signal, TokenInputs, TokenLoss, Trait, hookimpl, setting
from dpkd.functional import kl, log_mix
from dpkd_zoo.papers import DISTILLM, at

__all__ = ["SPEC", "DistiLLMConfig", "DistiLLMLoss", "dpkd_losses"]


class DistiLLMConfig(LossConfig):
    """The divergence and its skew."""

    divergence: Literal["skl", "srkl"] = setting(
        "skl", description="skew forward or skew reverse KL", source="DistiLLM's shipped script: adaptive-sfkl"
    )
    skew: float = setting(
        0.1, description="α: share of the other model in the mixture", source="DistiLLM §3.1 and losses.py", ge=0, lt=1
    )


class DistiLLMLoss(TokenLoss[DistiLLMConfig]):
    """`KL(p ‖ α p + (1-α) q)`, or `KL(q ‖ (1-α) p + α q)`."""

    def forward(self, x: TokenInputs) -> Tensor:
        from_NV, to_NV = x.teacher_log_probs(), x.student_log_probs()
        if self.config.divergence == "srkl":
            from_NV, to_NV = to_NV, from_NV
        return kl(from_NV, log_mix(from_NV, to_NV, self.config.skew))


SPEC = LossSpec(
    name="distillm",
    loss=DistiLLMLoss,
    config=DistiLLMConfig,
    card=Card(
        title="DistiLLM's objective, without its adaptive choice of text",
        summary="Skew KL on a fixed mix of data and student text; the paper's adaptive off-policy text is missing.",
        formula="KL(p‖α·p + (1-α)·q)  or  KL(q‖(1-α)·p + α·q)",
        sources=(at(DISTILLM, "§3.1, skew KL; §3.2, adaptive off-policy, is not implemented (sections from memory)"),),
        use_when="DistiLLM's divergence is wanted on text that the student partly writes, with sampling once an epoch.",
        avoid_when="The paper is to be replicated: its numbers rest on the adaptive text too.",
        notes="Missing: φ, the probability of student text, which starts at 0 and rises by 0.1 when the validation "
        "loss rises, and the replay buffer of 1,000 responses. In their place φ = 0.5 throughout (our choice) "
        "and responses that are up to an epoch old (text.refresh=per_epoch). The paper adds a language-model "
        "term of weight 1 on plain text (terms.pretrain.weight=1 with a corpus). The loss itself takes about "
        "1.7 times kd's time, and more goes into the sampling of half the responses once an epoch. skl and srkl "
        "are the same objectives on given text.",
    ),
    reads=frozenset({Signal.STUDENT_LOGITS, Signal.TEACHER_LOGITS}),
    suggests={"text": {"source": "mixed", "mix": {"dataset": 0.5, "student": 0.5}, "refresh": "per_epoch"}},
    traits=frozenset({Trait.ZERO_AT_MATCH, Trait.NON_NEGATIVE, Trait.SHIFT_INVARIANT}),
)


@hookimpl
def dpkd_losses() -> list[LossSpec]:
    """This module's loss."""
    return [SPEC]
