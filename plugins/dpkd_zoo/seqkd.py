"""Sequence-level knowledge distillation: maximum likelihood on responses that the teacher wrote.

Kim & Rush (2016) train on the teacher's beam-search mode; MiniLLM's and DPKD's baselines on one sample per prompt.
"""

from __future__ import annotations

from torch import Tensor

from dpkd.api import Card, LossConfig, LossSpec, Signal, Text, TokenInputs, TokenLoss, Trait, hookimpl, setting
from dpkd.functional import KLSum, kl, nll
from dpkd_zoo.papers import LMOPS, SEQKD, at


class SeqKDConfig(LossConfig):
    """Pure likelihood, or the released mixture."""

    kd_ratio: float = setting(
        0.0,
        description="share of word-level forward KL mixed in, as the released scripts do at 0.5",
        source="Kim & Rush: 0 (LMOps' seqkd_base.sh passes --kd-ratio 0.5)",
        ge=0,
        le=1,
    )


class SeqKDLoss(TokenLoss[SeqKDConfig]):
    """`(1-r) · -log q(y_i) + r · KL(p‖q)` on teacher text; r = 0 is the paper's."""

    def forward(self, x: TokenInputs) -> Tensor:
        ratio = self.config.kd_ratio
        if ratio == 0:
            return nll(x.student_log_probs(), x.targets)
        divergence_N = x.part("kl", kl(x.teacher_log_probs(), x.student_log_probs()))
        if ratio == 1:
            return divergence_N
        return (1 - ratio) * x.part("nll", nll(x.student_log_probs(), x.targets)) + ratio * divergence_N

    def kl_sum(self) -> KLSum:
        """The same, for fused kernels."""
        ratio = self.config.kd_ratio
        parts = ("kl", None, "nll") if ratio > 0 else (None, None, None)
        return KLSum(forward=ratio, likelihood=1 - ratio, parts=parts)


def _reads(config: SeqKDConfig) -> frozenset[Signal]:
    teacher = {Signal.TEACHER_LOGITS} if config.kd_ratio > 0 else set()
    targets = {Signal.TARGETS} if config.kd_ratio < 1 else set()
    return frozenset({Signal.STUDENT_LOGITS, *teacher, *targets})


SPEC = LossSpec(
    name="seqkd",
    loss=SeqKDLoss,
    config=SeqKDConfig,
    card=Card(
        title="Sequence-level knowledge distillation",
        summary="Cross-entropy on responses written by the teacher.",
        formula="-log q(yᵢ | y₍<ᵢ₎, x),  y ~ p(·|x)",
        sources=(at(SEQKD, "§3.2"), at(LMOPS, "scripts/gpt2/seqkd, scripts/gpt2/tools/generate_data_seqkd.sh")),
        use_when="The teacher can be sampled but not scored (another tokenizer, an API), or must run only once.",
        avoid_when="Its logits are at hand: word-level losses learn more from the same text.",
        notes="The teacher's text is sampled at T = 1, top-p 1, once per prompt, and kept in a store. The released "
        "`seqkd` scripts still pass --kd-ratio 0.5: kd_ratio=0.5 reproduces them.",
    ),
    reads=_reads,
    accepts=frozenset({Text.TEACHER, Text.DATASET}),
    suggests={"text": {"source": "teacher"}},
    traits=frozenset({Trait.NON_NEGATIVE, Trait.SHIFT_INVARIANT}),
)


@hookimpl
def dpkd_losses() -> list[LossSpec]:
    """This module's loss."""
    return [SPEC]
