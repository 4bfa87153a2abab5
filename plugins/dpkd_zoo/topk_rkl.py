"""Reverse KL on the student's k likeliest tokens: what a server that scores ids of the caller's choice can provide.

The student q chooses the set C, so the teacher p need not be known elsewhere. The rest C̄ is one token more: by the
log-sum inequality its part, q(C̄) log(q(C̄)/p(C̄)), is at most what the tokens of C̄ add to KL(q‖p).
"""

from __future__ import annotations

from torch import Tensor

from dpkd.api import Card, LossConfig, LossSpec, Signal, TokenInputs, TokenLoss, Trait, hookimpl, setting
from dpkd.functional import kl, with_rest
from dpkd_zoo.papers import MINILLM, at


class TopKRKLConfig(LossConfig):
    """How many tokens."""

    k: int = setting(
        16, description="the student's likeliest tokens that the teacher scores", source="our choice, of 8 to 64", ge=1
    )


class TopKRKLLoss(TokenLoss[TopKRKLConfig]):
    """`Σ_{v∈C} q log(q/p) + q(C̄) log(q(C̄)/p(C̄))`."""

    def forward(self, x: TokenInputs) -> Tensor:
        ids_NK = x.chosen_ids[:, : self.config.k]
        return kl(with_rest(x.student_log_probs(), ids_NK), with_rest(x.teacher_log_probs(), ids_NK))


SPEC = LossSpec(
    name="topk-rkl",
    loss=TopKRKLLoss,
    config=TopKRKLConfig,
    card=Card(
        title="Reverse KL on the student's top k",
        summary="KL(q‖p) over the student's k likeliest tokens and one bucket for the rest.",
        formula="Σ_{v∈C} q(v)·log(q(v)/p(v)) + q(C̄)·log(q(C̄)/p(C̄)),  C = the k likeliest under q",
        sources=(at(MINILLM, "§2.1: the reverse KL; the restriction to k tokens is ours"),),
        use_when="The teacher is served and scores ids of the caller's choice; on the student's text "
        "(text.source=student) with far less variance than opd.",
        avoid_when="The teacher's logits are available: rkl has no bias. k is so small that much of the student's mass "
        "is outside: topk-rkl-sampled has no bias on its own text.",
        notes="Bias: the value is at most rkl's. What is missing is q(C̄) times the KL of the two distributions within "
        "the rest, so no gradient says how the mass within the rest should move; none is missing for k ≥ V - 1. With "
        "a served teacher the tokens are chosen by a forward of the student of their own, without dropout: about a "
        "third more time of a step. Infinite where the teacher excludes one of the k tokens.",
        latex=r"\sum_{v\in C}q(v)\log\frac{q(v)}{p(v)}+q(\bar C)\log\frac{q(\bar C)}{p(\bar C)}, \qquad C=\text{the "
        r"}k\text{ likeliest under }q",
    ),
    reads=frozenset({Signal.STUDENT_LOGITS, Signal.TEACHER_LOGITS, Signal.CHOSEN_IDS}),
    chosen_k=lambda config: config.k,
    suggests={"text": {"source": "student", "refresh": "every_step"}},
    traits=frozenset({Trait.ZERO_AT_MATCH, Trait.NON_NEGATIVE, Trait.SHIFT_INVARIANT}),
)


@hookimpl
def dpkd_losses() -> list[LossSpec]:
    return [SPEC]
