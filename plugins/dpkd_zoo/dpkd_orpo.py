"""Odds-ratio preference (ORPO, Hong et al., 2403.07691) of the teacher's response over the student's; no reference.

A response's probability is P = exp(mean log-prob per token), its odds P/(1-P).
"""

from __future__ import annotations

import torch
from torch import Tensor

from dpkd.api import Card, LossConfig, LossSpec, PairInputs, PairLoss, Trait, hookimpl, setting
from dpkd.functional import preference
from dpkd_zoo import pairs
from dpkd_zoo.papers import ORPO, TRL_PREFERENCE, at

CERTAIN = -1e-6  # mean log-probs above it are treated as this value in 1 - P: the odds stay finite


class DPKDORPOConfig(LossConfig):
    """The weight of the preference beside the likelihood."""

    odds_weight: float = setting(
        0.1,
        description="λ of the odds-ratio part",
        source="released run_mistral_orpo_beta.sh: --alpha (TRL: its beta)",
        gt=0,
    )


def _log_odds(logp: Tensor) -> Tensor:
    """`log P - log(1-P)`; expm1 keeps the digits of 1-P where P is nearly 1, and elsewhere they do not matter."""
    return logp - (-torch.expm1(logp.clamp(max=CERTAIN))).log()


class DPKDORPOLoss(PairLoss[DPKDORPOConfig]):
    """`-log P(y_t) - λ log σ(log odds(y_t) - log odds(y_s))`."""

    def forward(self, x: PairInputs) -> Tensor:
        logp_t, logp_s = pairs.log_ratios(x, None, "mean")
        log_ratio = x.part("log_odds_ratio", _log_odds(logp_t) - _log_odds(logp_s))
        likelihood = x.part("log_likelihood", logp_t)
        return self.config.odds_weight * preference(log_ratio) - likelihood


SPEC = LossSpec(
    name="dpkd-orpo",
    loss=DPKDORPOLoss,
    config=DPKDORPOConfig,
    card=Card(
        title="DPKD, ORPO form",
        summary="Likelihood of the teacher's response, plus a preference by the odds of both; no reference.",
        formula="-log P(yₜ) - λ·log σ(log(P(yₜ)/(1-P(yₜ))) - log(P(yₛ)/(1-P(yₛ)))),  P(y) = q(y)^(1/|y|)",
        sources=(
            at(ORPO, "Eq. 4 and 7, as numbered in TRL's code; released code xfactlab/orpo, src/orpo_trainer.py"),
            at(TRL_PREFERENCE, "ORPOTrainer (trl/experimental/orpo/orpo_trainer.py)"),
        ),
        use_when="Only the teacher's text is available, and one run should do both fine-tuning and preference: it "
        "needs no SFT student, no reference and no LM term.",
        avoid_when="The teacher can score: dpkd uses what it knows. With λ = 0.1 the preference is a nudge beside the "
        "likelihood.",
        notes="The objective of ORPO-Distill (2509.25100), whose mixed-policy student text is not built in. TRL takes "
        "the likelihood over prompt and response, as a mean over all tokens of the batch; here it is over the "
        "response, and all pairs weigh the same, as in the paper. Where P rounds to 1 the odds are infinite and TRL "
        "returns a NaN; here log(1-P) stops at -13.8. Costs two responses per prompt through the student, none through "
        "the teacher, plus sampling both.",
        latex=r"-\log P(y_t)-\lambda\log\sigma\Big(\log\frac{P(y_t)}{1-P(y_t)}-\log\frac{P(y_s)}{1-P(y_s)}\Big), "
        r"\qquad P(y)=q(y)^{1/|y|}",
    ),
    reads=pairs.STUDENT,
    suggests=pairs.TEACHER_OVER_STUDENT,
    traits=frozenset({Trait.NON_NEGATIVE}),
)


@hookimpl
def dpkd_losses() -> list[LossSpec]:
    return [SPEC]
