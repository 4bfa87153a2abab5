"""DistiLLM (Ko et al., 2402.03898): a skew KL, on text that the student partly writes.

The paper has two parts. The skew divergence is this loss. The adaptive off-policy choice of text, a probability of
student text that rises when the held-out loss does and a replay buffer, is `text.source=adaptive`; it needs held-out
rows, so the loss suggests a fixed share, resampled every epoch.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from dpkd.api import Card, LossConfig, LossSpec, Signal, TokenInputs, TokenLoss, Trait, hookimpl, setting
from dpkd.functional import KLSum, kl, log_mix
from dpkd_zoo.papers import DISTILLM, at


class DistiLLMConfig(LossConfig):
    """The divergence and its skew."""

    divergence: Literal["skl", "srkl"] = setting(
        "skl", description="skew forward or skew reverse KL", source="DistiLLM's released script: adaptive-sfkl"
    )
    skew: float = setting(
        0.1,
        description="α: share of the other model in the mixture",
        source="DistiLLM §3; released --skew-alpha",
        ge=0,
        lt=1,
    )


class DistiLLMLoss(TokenLoss[DistiLLMConfig]):
    """`KL(p ‖ α p + (1-α) q)`, or `KL(q ‖ (1-α) p + α q)`."""

    def forward(self, x: TokenInputs) -> Tensor:
        from_NV, to_NV = x.teacher_log_probs(), x.student_log_probs()
        if self.config.divergence == "srkl":
            from_NV, to_NV = to_NV, from_NV
        return kl(from_NV, log_mix(from_NV, to_NV, self.config.skew))

    def kl_sum(self) -> KLSum:
        skew = self.config.skew
        if self.config.divergence == "srkl":
            return KLSum(reverse=1.0, reverse_share=1.0 - skew)
        return KLSum(forward=1.0, forward_share=skew)


SPEC = LossSpec(
    name="distillm",
    loss=DistiLLMLoss,
    config=DistiLLMConfig,
    card=Card(
        title="DistiLLM",
        summary="Skew KL on data and student text: a fixed mix, or the paper's adaptive one with held-out rows.",
        formula="KL(p‖α·p + (1-α)·q)  or  KL(q‖(1-α)·p + α·q)",
        sources=(at(DISTILLM, "§3: skew KL and adaptive off-policy generation; released losses.py and finetune.py"),),
        use_when="The student can write, sampling at every step is too slow, and you want a bounded divergence.",
        avoid_when="The student's text is still nonsense, or there is no time to sample: skl and srkl are the same "
        "objectives on given text.",
        notes="The paper's text: text.source=adaptive with dev.path=ROWS (and dev.every, an epoch in the paper). φ "
        "starts at 0 and rises by 0.1 whenever the loss on these rows is 0.1 above its value at the last rise (first "
        "compared before training); text.share and the others default to the released code's. There a draw is made "
        "for each micro-batch, here for each optimizer step, and the held-out loss is a mean over batches, here over "
        "tokens. Without held-out rows φ = 0.5 throughout (our choice), with responses up to an epoch old. The paper "
        "adds a language-model term of weight 1 on plain text (terms.pretrain.weight=1 with a corpus), and starts "
        "from a fine-tuned student. The loss itself takes about 1.7 times kd's time; sampling takes more.",
        latex=r"\mathrm{KL}\big(p\,\|\,\alpha p+(1-\alpha)q\big)\quad\text{or}\quad\mathrm{KL}"
        r"\big(q\,\|\,(1-\alpha)p+\alpha q\big)",
    ),
    reads=frozenset({Signal.STUDENT_LOGITS, Signal.TEACHER_LOGITS}),
    suggests={"text": {"source": "mixed", "mix": {"dataset": 0.5, "student": 0.5}, "refresh": "per_epoch"}},
    traits=frozenset({Trait.ZERO_AT_MATCH, Trait.NON_NEGATIVE, Trait.SHIFT_INVARIANT}),
)


@hookimpl
def dpkd_losses() -> list[LossSpec]:
    return [SPEC]
