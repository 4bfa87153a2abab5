"""General online logit distillation (GOLD): a teacher with another tokenizer, on given text or on the student's own.

Hugging Face's GOLD, as TRL's GOLDTrainer has it: spans of text that both tokenizers delimit are aligned, the
probability of a span of several tokens is merged by the chain rule, tokens that both vocabularies have are compared by
a generalized JSD, and the others by ULD (2402.12030).
"""

from __future__ import annotations

import math

from torch import Tensor

from dpkd.api import Card, LossConfig, LossSpec, Signal, TokenInputs, TokenLoss, Trait, hookimpl, setting
from dpkd.functional import jensen_shannon, sorted_distance
from dpkd_zoo.papers import GOLD, TRL_GOLD, ULD, at


class GOLDConfig(LossConfig):
    """The divergence of common tokens, and what the others weigh."""

    beta: float = setting(
        0.5, description="β: share of the teacher in the mixture m", source="TRL's GOLDConfig", gt=0, lt=1
    )
    hybrid: bool = setting(
        True,
        description="compare common tokens by identity; false: sort all of them, as ULD does",
        source="GOLD's article (TRL: off unless asked for)",
    )
    matched_weight: float | None = setting(
        None,
        description="weight of the common tokens, the others get the rest; none: their share of the teacher's "
        "vocabulary",
        source="TRL's GOLDConfig",
        gt=0,
        le=1,
    )


class GOLDLoss(TokenLoss[GOLDConfig]):
    """`w · JSD_β(p̃, q̃) over common tokens + (1-w) · ULD(p̃, q̃) over the others`."""

    def forward(self, x: TokenInputs) -> Tensor:
        # The chain rule: mass of a first token times the probability of how the span goes on.
        log_p_NV = x.teacher_log_probs() + x.teacher_rest.unsqueeze(-1)
        log_q_NV = x.student_log_probs() + x.student_rest.unsqueeze(-1)
        if not self.config.hybrid:
            return sorted_distance(log_p_NV.exp(), log_q_NV.exp())
        known_NV = log_p_NV > -math.inf
        common_NV = known_NV & (log_q_NV > -math.inf)
        value_N = x.part(
            "common",
            jensen_shannon(
                log_p_NV.masked_fill(~common_NV, -math.inf),
                log_q_NV.masked_fill(~common_NV, -math.inf),
                self.config.beta,
            ),
        )
        weight_N: Tensor | float = common_NV.sum(-1) / known_NV.sum(-1)
        if self.config.matched_weight is not None:
            weight_N = self.config.matched_weight
        # With one vocabulary there are no others, and nothing to sort.
        if bool(common_NV.all()):
            return weight_N * value_N
        others_N = sorted_distance(log_p_NV.exp().masked_fill(common_NV, 0), log_q_NV.exp().masked_fill(common_NV, 0))
        return weight_N * value_N + (1 - weight_N) * x.part("others", others_N)


SPEC = LossSpec(
    name="gold",
    loss=GOLDLoss,
    config=GOLDConfig,
    card=Card(
        title="General online logit distillation",
        summary="JSD on the tokens that both vocabularies have, ULD on the others, at aligned spans of text.",
        formula="w·(β·Σ_{v∈C} p̃ log(p̃/m) + (1-β)·Σ_{v∈C} q̃ log(q̃/m)) + (1-w)·Σᵢ |p̃₍ᵢ₎ - q̃₍ᵢ₎| over v∉C,  m = "
        "β·p̃ + (1-β)·q̃,  p̃(v) = p(v)·p(rest of the span),  C = tokens of both,  w = |C|/|V_teacher|",
        sources=(
            at(GOLD, "sequence and vocabulary alignment"),
            at(TRL_GOLD, "ULDLoss with uld_use_hybrid_loss"),
            at(ULD, "§3"),
        ),
        use_when="The teacher has another tokenizer, above all where the two vocabularies share many tokens, on given "
        "text or on the student's own.",
        avoid_when="The vocabularies share little: most of the mass is then compared by rank alone. Or the student "
        "cannot write such text yet and there is no LM term: spans are unlikely, and the gradient is small. With one "
        "tokenizer use jsd, which is the same.",
        notes="p̃ and q̃ are not renormalised, and need not be: with one mixture m on both sides the masses cancel, "
        "so the JSD of 0 < β < 1 stays non-negative, and is 0 only where p̃ = q̃ (which is why β = 0 and 1 are not "
        "offered). The value of a span falls with its probability under both models: long spans weigh little. What "
        "differs from TRL: here the distribution that predicts a span's first token is merged with the rest (TRL's "
        "`observed` takes the logits one position later; its `bayesian` has the right position but merges the last "
        "token's distribution); tokens are the same if they spell the same bytes, `Ġthe` and `▁the` (TRL: the same "
        "string); the end of a response is a span (TRL skips it); the mean is over spans of the step (TRL: per "
        "response); tokens that only one model has always cost their mass; log-probs are not clamped. TRL adds no "
        "cross-entropy by default; terms.lm.weight does here. TRL samples half of the batches from the student (at "
        "temperature 0.9, top-p 0.95, 128 tokens) with a learning rate of 1e-7; text.source=dataset trains on given "
        "text. Cost: as for uld, plus a JSD over the union of both vocabularies.",
        latex=r"w\Big(\beta\sum_{v\in C}\tilde p\log\frac{\tilde p}{m}+(1-\beta)\sum_{v\in C}\tilde q\log\frac{\tilde "
        r"q}{m}\Big)+(1-w)\sum_i\big|\tilde p_{(i)}-\tilde q_{(i)}\big|_{v\notin C}, \qquad m=\beta\tilde "
        r"p+(1-\beta)\tilde q",
    ),
    reads=frozenset({Signal.STUDENT_LOGITS, Signal.TEACHER_LOGITS, Signal.STUDENT_REST, Signal.TEACHER_REST}),
    suggests={"text": {"source": "mixed", "mix": {"dataset": 0.5, "student": 0.5}}},
    traits=frozenset({Trait.ZERO_AT_MATCH, Trait.NON_NEGATIVE, Trait.SHIFT_INVARIANT, Trait.ACROSS_TOKENIZERS}),
)


@hookimpl
def dpkd_losses() -> list[LossSpec]:
    return [SPEC]
