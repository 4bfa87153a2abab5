"""The terms that any run may add to its main loss: language modelling on responses or on plain text."""

from __future__ import annotations

from torch import Tensor

from dpkd.api import LossConfig, Signal, TokenInputs, TokenLoss, setting
from dpkd.functional import KLSum, kl, nll


class LanguageModellingConfig(LossConfig):
    kd_ratio: float = setting(0.0, description="share of word-level KD", source="DPKD Algorithm 1, line 6", ge=0, le=1)


class LanguageModelling(TokenLoss[LanguageModellingConfig]):
    """`(1-r) · -log q(target) + r · KL(p‖q)`: the paper's L_pt at r = 0, the released code's at r = 0.5."""

    def reads(self) -> frozenset[Signal]:
        own = frozenset({Signal.STUDENT_LOGITS, Signal.TARGETS})
        return own | {Signal.TEACHER_LOGITS} if self.config.kd_ratio > 0 else own

    def forward(self, x: TokenInputs) -> Tensor:
        ratio = self.config.kd_ratio
        likelihood_N = nll(x.student_log_probs(), x.targets)
        if ratio == 0:
            return likelihood_N
        divergence_N = x.part("kl", kl(x.teacher_log_probs(), x.student_log_probs()))
        # At a share of 1 an infinite likelihood times 0 would be NaN.
        return divergence_N if ratio == 1 else (1 - ratio) * x.part("nll", likelihood_N) + ratio * divergence_N

    def kl_sum(self) -> KLSum:
        ratio = self.config.kd_ratio
        parts = ("kl", None, "nll" if ratio < 1 else None) if ratio > 0 else (None, None, None)
        return KLSum(forward=ratio, likelihood=1 - ratio, parts=parts)
