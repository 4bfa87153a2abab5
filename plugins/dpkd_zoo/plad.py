"""PLaD (Zhang et al., 2406.02886): a hinge on the student's likelihood per token of teacher's and own response.

The pairs are pseudo-preferences: that the teacher's response is the better one is assumed, not judged.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from dpkd.api import Card, LossConfig, LossSpec, PairInputs, PairLoss, Signal, Trait, hookimpl, setting
from dpkd.functional import aggregate
from dpkd_zoo.papers import PLAD, SLIC, at


class PLaDConfig(LossConfig):
    """Which margin the two likelihoods should keep."""

    form: Literal["ranking", "margin"] = setting(
        "ranking",
        description="ranking: the same margin for every pair; margin: what a score says of the pair",
        source="PLaD has both (from memory)",
    )
    margin: float = setting(
        1.0,
        description="δ of the ranking form, in nats per token",
        source="our choice (PLaD's value is not known to us)",
        gt=0,
    )


class PLaDLoss(PairLoss[PLaDConfig]):
    """`max(0, δ - log q(y_t)/|y_t| + log q(y_s)/|y_s|)`, δ fixed or `log p(y_t)/|y_t| - log p(y_s)/|y_s|`."""

    def forward(self, x: PairInputs) -> Tensor:
        logp_t = aggregate(x.student.chosen, x.lengths.chosen, "mean")
        logp_s = aggregate(x.student.rejected, x.lengths.rejected, "mean")
        gap = x.part("margin", logp_t - logp_s)
        if self.config.form == "ranking":
            return torch.relu(self.config.margin - gap)
        score_t = aggregate(x.teacher.chosen, x.lengths.chosen, "mean")
        score_s = aggregate(x.teacher.rejected, x.lengths.rejected, "mean")
        return torch.relu(score_t - score_s - gap)


def _reads(config: PLaDConfig) -> frozenset[Signal]:
    teacher = {Signal.TEACHER_LOGPS} if config.form == "margin" else set()
    return frozenset({Signal.STUDENT_LOGPS, Signal.LENGTHS, *teacher})


SPEC = LossSpec(
    name="plad",
    loss=PLaDLoss,
    config=PLaDConfig,
    card=Card(
        title="PLaD, pseudo-preference pairs",
        summary="Rank the teacher's response above the student's by the student's own likelihood per token.",
        formula="max(0, δ - log q(yₜ)/|yₜ| + log q(yₛ)/|yₛ|),  δ a number, or s(yₜ) - s(yₛ)",
        sources=(
            at(PLAD, "§3, ranking and margin calibration losses (formulas from memory)"),
            at(SLIC, "the calibration loss that it takes over (from memory)"),
        ),
        use_when="Only the teacher's text is to be had, and the student was fine-tuned on it already.",
        avoid_when="Without an LM term, or from a student that was not fine-tuned: nothing but the ranking holds the "
        "likelihood of the teacher's response, and a hinge is content when both fall.",
        notes="Formulas from memory: check them against the paper before you publish with them. The score s of the "
        "margin form is here the teacher's own log-prob per token, which the paper, made for teachers behind an API, "
        "does not have; where the teacher likes yₛ better the margin is negative. PLaD fine-tunes on teacher text "
        "first, then ranks with pairs sampled once (text.refresh=once); here an LM term on data-set responses runs "
        "beside (weight 1). Costs two responses per prompt through the student, about twice sft, and sampling; the "
        "margin form as much again through the teacher.",
    ),
    reads=_reads,
    suggests={
        "text": {"source": "pairs", "chosen": "teacher", "rejected": "student", "refresh": "every_step"},
        "terms": {"lm": {"weight": 1.0}},
    },
    traits=frozenset({Trait.NON_NEGATIVE}),
)


@hookimpl
def dpkd_losses() -> list[LossSpec]:
    """This module's loss."""
    return [SPEC]
