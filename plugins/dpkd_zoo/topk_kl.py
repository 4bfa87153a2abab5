"""Forward KL over the teacher's k likeliest tokens and one bucket for all the rest.

This is what a store of the teacher's top-k log-probs can provide. The bucket keeps it a divergence: over k tokens
alone, without it, the gradient `a·q - p` (a: the mass that was kept) pulls the student to an over-confident q = p/a.
"""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor

from dpkd.api import Card, LossConfig, LossSpec, Signal, TokenInputs, TokenLoss, Trait, hookimpl, setting
from dpkd.functional import kl, log_total, with_rest
from dpkd_zoo.papers import SAMPLED_KD, TRL, at


class TopKKLConfig(LossConfig):
    """How many tokens, and how the others are treated."""

    k: int = setting(64, description="tokens kept per position; more than V: all", source="our choice", ge=1)
    tail: Literal["bucket", "renormalise"] = setting(
        "bucket",
        description="the rest as one more token, or both models renormalized over the k tokens",
        source="our choice: renormalizing ignores the mass outside",
    )


def _renormalised(log_NK: Tensor) -> Tensor:
    """Log-probabilities of the tokens among themselves `[N, K]`."""
    total_N1 = log_total(log_NK).unsqueeze(-1)
    return log_NK - total_N1.masked_fill(total_N1 == -math.inf, 0.0)


class TopKKLLoss(TokenLoss[TopKKLConfig]):
    """`Σ_{v in top k} p(v) log(p(v)/q(v)) + p(rest) log(p(rest)/q(rest))`."""

    def forward(self, x: TokenInputs) -> Tensor:
        log_p_NV, log_q_NV = x.teacher_log_probs(), x.student_log_probs()
        top = log_p_NV.topk(min(self.config.k, log_p_NV.shape[-1]), dim=-1)
        if self.config.tail == "bucket":
            return kl(with_rest(log_p_NV, top.indices), with_rest(log_q_NV, top.indices))
        # Tokens that the teacher excludes have no order: none of them is among its likeliest.
        chosen_q_NK = log_q_NV.gather(-1, top.indices).masked_fill(top.values == -math.inf, -math.inf)
        return kl(_renormalised(top.values), _renormalised(chosen_q_NK))


SPEC = LossSpec(
    name="topk-kl",
    loss=TopKKLLoss,
    config=TopKKLConfig,
    card=Card(
        title="Forward KL on the teacher's top k",
        summary="KL(p‖q) over the teacher's k likeliest tokens and one bucket for the rest.",
        formula="Σ_{v∈K} p(v)·log(p(v)/q(v)) + p(K̄)·log(p(K̄)/q(K̄)),  K = the k likeliest under p",
        sources=(
            at(
                SAMPLED_KD,
                "the ghost token; the authors' akhilkedia/RandomSamplingKD, ACL_poster/Presentation.pptx, p. 12",
            ),
            at(TRL, "trl/experimental/iw_opd/iw_opd_trainer.py: _add_tail_bucket"),
        ),
        use_when="The teacher is a store of its top-k log-probs, or its tail is noise to be ignored.",
        avoid_when="Speed is the goal: with a live teacher all logits are there, and choosing costs more than it "
        "saves.",
        notes="At most the full KL, and equal to it for k ≥ V (the bucket merges tokens). Other toolkits drop the "
        "rest without renormalizing, which is not a divergence and biased: the student becomes over-confident; or "
        "renormalize (tail=renormalise), where mass outside the k tokens costs nothing. sampled-kl has no bias. The "
        "loss itself takes about 1.6 times kd's time. Infinite where the student excludes one of the k tokens (a "
        "logit of -inf).",
        latex=r"\sum_{v\in K}p(v)\log\frac{p(v)}{q(v)}+p(\bar K)\log\frac{p(\bar K)}{q(\bar K)}, \qquad K=\text{the "
        r"}k\text{ likeliest under }p",
    ),
    reads=frozenset({Signal.STUDENT_LOGITS, Signal.TEACHER_LOGITS}),
    top_k=lambda config: config.k,
    traits=frozenset({Trait.ZERO_AT_MATCH, Trait.NON_NEGATIVE, Trait.SHIFT_INVARIANT}),
)


@hookimpl
def dpkd_losses() -> list[LossSpec]:
    return [SPEC]
