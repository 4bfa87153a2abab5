"""PLaD (Zhang et al., 2406.02886): a hinge on the student's likelihood per token of the teacher's and its own response.

The pairs are pseudo-preferences: that the teacher's response is the better one is assumed, not judged.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from dpkd.api import Card, LossConfig, LossSpec, PairInputs, PairLoss, Signal, Trait, hookimpl, setting
from dpkd.functional import aggregate
from dpkd_zoo import pairs
from dpkd_zoo.papers import PLAD, SLIC, at


class PLaDConfig(LossConfig):
    """The margin between the two likelihoods."""

    form: Literal["ranking", "margin"] = setting(
        "ranking",
        description="ranking: the same margin for every pair; margin: a score decides it for each pair",
        source="PLaD proposes both (ranking and margin-based losses)",
    )
    margin: float = setting(
        1.0,
        description="δ of the ranking form, in nats per token",
        source="our choice (PLaD's value not confirmed)",
        gt=0,
    )


class PLaDLoss(PairLoss[PLaDConfig]):
    """`max(0, δ - log q(y_t)/|y_t| + log q(y_s)/|y_s|)`, δ fixed or `log p(y_t)/|y_t| - log p(y_s)/|y_s|`."""

    def forward(self, x: PairInputs) -> Tensor:
        gap = x.part("margin", pairs.margin(x, None, "mean"))
        if self.config.form == "ranking":
            return torch.relu(self.config.margin - gap)
        score_t = aggregate(x.teacher.chosen, x.lengths.chosen, "mean")
        score_s = aggregate(x.teacher.rejected, x.lengths.rejected, "mean")
        return torch.relu(score_t - score_s - gap)


def _reads(config: PLaDConfig) -> frozenset[Signal]:
    return pairs.STUDENT_AND_TEACHER if config.form == "margin" else pairs.STUDENT


SPEC = LossSpec(
    name="plad",
    loss=PLaDLoss,
    config=PLaDConfig,
    card=Card(
        title="PLaD, pseudo-preference pairs",
        summary="Rank the teacher's response above the student's by the student's own likelihood per token.",
        formula="max(0, δ - log q(yₜ)/|yₜ| + log q(yₛ)/|yₛ|),  δ a number, or s(yₜ) - s(yₛ)",
        sources=(
            at(PLAD, "ranking and margin-based calibration losses (formulas not confirmed)"),
            at(SLIC, "§2: the calibration loss that it builds on"),
        ),
        use_when="Only the teacher's text is available, and the student is already fine-tuned on it.",
        avoid_when="Without an LM term, or from a student that is not fine-tuned: only the ranking acts on the "
        "likelihood of the teacher's response, and a hinge is satisfied when both fall.",
        notes="The score s of the margin form is the teacher's own log-prob per token here; the paper, written for "
        "teachers behind an API, does not have it. Where the teacher prefers yₛ the margin is negative. PLaD "
        "fine-tunes on teacher text first, then ranks pairs that were sampled once (text.refresh=once); here an LM "
        "term on data-set responses runs beside it (weight 1). Costs two responses per prompt through the student, "
        "about twice sft, plus sampling; the margin form as much again through the teacher.",
        latex=r"\max\Big(0,\,\delta-\frac{\log q(y_t)}{|y_t|}+\frac{\log q(y_s)}{|y_s|}\Big), \qquad \delta\text{ "
        r"constant, or } s(y_t)-s(y_s)",
        unconfirmed="The exact form of both losses: the paper's abstract confirms pseudo-preference pairs, ranking "
        "and margin-based losses and a score function. Check the paper before you publish with it.",
    ),
    reads=_reads,
    suggests=pairs.WITH_LM_TERM,
    traits=frozenset({Trait.NON_NEGATIVE}),
)


@hookimpl
def dpkd_losses() -> list[LossSpec]:
    return [SPEC]
