"""DPKD with the penalty of DPOP (Smaug, Pal et al., 2402.13228), on whole responses.

A preference loss is content when both responses become unlikely, the rejected one faster. The penalty takes from
the margin what log q(y_t) lacks against the reference, here the teacher: y_t may not become less likely.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from dpkd.api import Card, LossConfig, LossSpec, PairInputs, PairLoss, Signal, Trait, hookimpl, setting
from dpkd.functional import aggregate, preference
from dpkd_zoo.papers import DPKD, DPKD_CODE, SMAUG, at


class DPKDDPOPConfig(LossConfig):
    """Strength, weight of the penalty, length normalisation."""

    beta: float = setting(
        0.1,
        description="β of the implicit reward",
        source="released arguments.py of DPKD (Smaug: 0.3, from memory)",
        gt=0,
    )
    dpop_weight: float = setting(
        50.0,
        description="λ: what a nat that log q(y_t) lacks takes from the margin",
        source="Smaug (from memory); released arguments.py of DPKD",
        ge=0,
    )
    aggregation: Literal["mean", "sum"] = setting(
        "mean", description="mean: log-ratios per token; sum: of whole responses", source="DPKD Eq. 9 (Smaug: sum)"
    )


class DPKDDPOPLoss(PairLoss[DPKDDPOPConfig]):
    """`-log σ(β [h - λ max(0, log p(y_t)/q(y_t))])`, `h = log q/p(y_t) - log q/p(y_s)`."""

    def forward(self, x: PairInputs) -> Tensor:
        c = self.config
        ratio_t = aggregate(x.student.chosen - x.teacher.chosen, x.lengths.chosen, c.aggregation)
        ratio_s = aggregate(x.student.rejected - x.teacher.rejected, x.lengths.rejected, c.aggregation)
        penalty = x.part("penalty", torch.relu(-ratio_t))  # relu has no gradient at 0, clamp has
        margin = x.part("margin", ratio_t - ratio_s)
        return preference(c.beta * (margin - c.dpop_weight * penalty))


SPEC = LossSpec(
    name="dpkd-dpop",
    loss=DPKDDPOPLoss,
    config=DPKDDPOPConfig,
    card=Card(
        title="DPKD with the DPOP penalty",
        summary="Preference over the teacher as reference, with a penalty where yₜ is less likely than to the teacher.",
        formula="-log σ(β·(h - λ·max(0, log(p(yₜ)/q(yₜ))))),  h = log(q(yₜ)/p(yₜ)) - log(q(yₛ)/p(yₛ)), log-ratios "
        "divided by |y|",
        sources=(
            at(SMAUG, "the DPOP loss (Eq. 3, from memory)"),
            at(DPKD, "Eq. 9; DPOP is cited in §4.4"),
            at(DPKD_CODE, "main.py:242-246: --DPOP, another form, see dpkd-token"),
        ),
        use_when="Under dpkd both likelihoods fall: part/penalty holds the teacher's response up inside the loss.",
        avoid_when="The student is far below the teacher on yₜ, which is usual at the start: the penalty then "
        "outweighs the preference by λ to 1, and the loss is little more than likelihood of yₜ. Lower λ, or take dpkd "
        "with an LM term.",
        notes="Smaug's reference is the model before training, so that its penalty starts at 0; the teacher as "
        "reference makes it a floor at the teacher's own likelihood, which it starts below. DPKD's released code has "
        "the penalty per token, outside σ and not times β (dpkd-token with form=dpop); here as in Smaug. λ = 0 is "
        "dpkd. Costs what dpkd costs: two responses per prompt through student and teacher, about twice kd, and "
        "sampling.",
    ),
    reads=frozenset({Signal.STUDENT_LOGPS, Signal.TEACHER_LOGPS, Signal.LENGTHS}),
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
