"""Reverse KL on the student's k likeliest tokens, and on the token that it drew in place of all the others.

With ℓ(v) = log q(v) - log p(v), ∇KL(q‖p) = Σ_v ℓ(v) ∇q(v) = Σ_{v∈C} ℓ(v) ∇q(v) + E_{y~q} 1[y∉C] ℓ(y) ∇log q(y): exact
over the student's k likeliest tokens C, and sampled outside. opd, whose estimator has all tokens sampled, is k = 0.
"""

from __future__ import annotations

from torch import Tensor

from dpkd.api import Card, LossConfig, LossSpec, Signal, Text, TokenInputs, TokenLoss, Trait, hookimpl, setting
from dpkd.functional import gather_logps
from dpkd_zoo.papers import MINILLM, ON_POLICY, at


class TopKRKLSampledConfig(LossConfig):
    """How many tokens are exact."""

    k: int = setting(
        16, description="the student's likeliest tokens that the teacher scores", source="our choice, of 8 to 64", ge=1
    )


class TopKRKLSampledLoss(TokenLoss[TopKRKLSampledConfig]):
    """`Σ_{v∈C} q ℓ + 1[y∉C] ℓ(y)`; ℓ is held fixed, so that the gradient is that of KL(q‖p) in expectation."""

    def forward(self, x: TokenInputs) -> Tensor:
        log_p_NV, log_q_NV, targets_N = x.teacher_log_probs(), x.student_log_probs(), x.targets
        ids_NK = x.chosen_ids[:, : self.config.k]
        log_q_NK = log_q_NV.gather(-1, ids_NK)
        gap_NK = (log_q_NK - log_p_NV.gather(-1, ids_NK)).detach()
        q_NK = log_q_NK.exp()
        inside_N = (q_NK * gap_NK.masked_fill(q_NK == 0, 0.0)).sum(-1)
        drawn_N = gather_logps(log_q_NV, targets_N)
        gap_N = (drawn_N - gather_logps(log_p_NV, targets_N)).detach()
        known_N = (ids_NK == targets_N.unsqueeze(-1)).any(-1)
        gap_N = gap_N.masked_fill(known_N, 0.0)
        return inside_N + gap_N * (1 + drawn_N - drawn_N.detach())


SPEC = LossSpec(
    name="topk-rkl-sampled",
    loss=TopKRKLSampledLoss,
    config=TopKRKLSampledConfig,
    card=Card(
        title="Reverse KL on the student's top k, the rest by the sampled token",
        summary="KL(q‖p) exact over the student's k likeliest tokens, and estimated outside by the token that it drew.",
        formula="Σ_{v∈C} q(v)·ℓ(v) + 1[y∉C]·ℓ(y),  ℓ = log q - log p,  C = the k likeliest under q,  y ~ q",
        sources=(
            at(MINILLM, "Eq. 3: the single-step part"),
            at(ON_POLICY, "the estimate by sampled tokens alone, k = 0"),
        ),
        use_when="The teacher is served and scores ids of the caller's choice, and the student writes the text anew in "
        "each step: less variance than opd, and no bias.",
        avoid_when="The teacher's logits are available (rkl). The text is old, or drawn with a temperature, top_k or "
        "top_p: topk-rkl then has the smaller error.",
        notes="Unbiased: value and gradient are those of rkl, in expectation over text that the student of now drew at "
        "temperature 1. On other text the sampled part is biased, by the ratio of the two policies. The value of a row "
        "may be negative. With a served teacher a forward of the student of their own chooses the tokens, without "
        "dropout: about a third more time of a step.",
        latex=r"\sum_{v\in C}q(v)\,\ell(v)+\mathbb{1}[y\notin C]\,\ell(y), \qquad \ell=\log q-\log p,\quad C=\text{the "
        r"}k\text{ likeliest under }q,\quad y\sim q",
    ),
    reads=frozenset({Signal.STUDENT_LOGITS, Signal.TEACHER_LOGITS, Signal.CHOSEN_IDS, Signal.TARGETS}),
    accepts=frozenset({Text.STUDENT}),
    chosen_k=lambda config: config.k,
    suggests={"text": {"source": "student", "refresh": "every_step"}, "student": {"dropout": "off"}},
    traits=frozenset({Trait.ZERO_AT_MATCH, Trait.SHIFT_INVARIANT, Trait.DETACHED_WEIGHTS}),
)


@hookimpl
def dpkd_losses() -> list[LossSpec]:
    return [SPEC]
