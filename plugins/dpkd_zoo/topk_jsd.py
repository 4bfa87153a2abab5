"""GKD's generalized Jensen-Shannon divergence on the student's k likeliest tokens and one bucket for the rest.

What `topk-rkl` is to `rkl`, this is to `jsd`: for a server that scores ids of the caller's choice.
"""

from __future__ import annotations

from torch import Tensor

from dpkd.api import Card, LossConfig, LossSpec, Signal, TokenInputs, TokenLoss, Trait, hookimpl, setting
from dpkd.functional import jensen_shannon, with_rest
from dpkd_zoo.papers import GKD, at


class TopKJSDConfig(LossConfig):
    """How many tokens, and the place between the two KLs."""

    k: int = setting(
        16, description="the student's likeliest tokens that the teacher scores", source="our choice, of 8 to 64", ge=1
    )
    beta: float = setting(
        0.5, description="β: share of the teacher in the mixture m", source="TRL's GKDConfig", gt=0, lt=1
    )


class TopKJSDLoss(TokenLoss[TopKJSDConfig]):
    """`β KL(p‖m) + (1-β) KL(q‖m)` over the k tokens and the bucket."""

    def forward(self, x: TokenInputs) -> Tensor:
        ids_NK = x.chosen_ids[:, : self.config.k]
        log_p, log_q = (with_rest(log_NV, ids_NK) for log_NV in (x.teacher_log_probs(), x.student_log_probs()))
        return jensen_shannon(log_p, log_q, self.config.beta)


SPEC = LossSpec(
    name="topk-jsd",
    loss=TopKJSDLoss,
    config=TopKJSDConfig,
    card=Card(
        title="Jensen-Shannon divergence on the student's top k",
        summary="GKD's divergence over the student's k likeliest tokens and one bucket for the rest.",
        formula="β·KL(p‖m) + (1-β)·KL(q‖m) over C and C̄ as one token,  m = β·p + (1-β)·q,  C = the k likeliest under q",
        sources=(at(GKD, "Eq. 1, D_JSD(β); the restriction to k tokens is ours"),),
        use_when="The teacher is served and scores ids of the caller's choice, and a bounded loss is wanted.",
        avoid_when="The teacher's logits are available (jsd); or the teacher's likeliest tokens are not among the "
        "student's: the bucket hides which of them it prefers (topk-kl asks for those).",
        notes="Bias: merging tokens only lowers a divergence, so the value is at most jsd's, and no gradient says how "
        "the mass within the rest should move; equal for k ≥ V - 1. Finite where either model excludes a token.",
        latex=r"\beta\,\mathrm{KL}(p\,\|\,m)+(1-\beta)\,\mathrm{KL}(q\,\|\,m)\ \text{over } C \text{ and } \bar C, "
        r"\qquad C=\text{the }k\text{ likeliest under }q",
    ),
    reads=frozenset({Signal.STUDENT_LOGITS, Signal.TEACHER_LOGITS, Signal.CHOSEN_IDS}),
    chosen_k=lambda config: config.k,
    suggests={"text": {"source": "student", "refresh": "every_step"}},
    traits=frozenset({Trait.ZERO_AT_MATCH, Trait.NON_NEGATIVE, Trait.SHIFT_INVARIANT}),
)


@hookimpl
def dpkd_losses() -> list[LossSpec]:
    return [SPEC]
