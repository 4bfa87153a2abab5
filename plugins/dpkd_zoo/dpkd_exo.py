"""EXO form of DPKD (Ji et al., 2402.00856): the reverse KL from the student's preference to a smoothed label.

The student prefers y_t with probability σ(m); the label says 1-ε. DPO is the forward KL of the same two coins (with
ε = 0), so that EXO stands to DPO as reverse to forward KL.
"""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor

from dpkd.api import Card, LossConfig, LossSpec, PairInputs, PairLoss, Signal, Trait, hookimpl, setting
from dpkd.functional import aggregate, preference
from dpkd_zoo.papers import DPKD, EXO, TRL_PREFERENCE, at


class DPKDEXOConfig(LossConfig):
    """Strength, and how sure the label is."""

    beta: float = setting(0.1, description="β of the implicit reward", source="TRL's DPO trainer", gt=0)
    label_smoothing: float = setting(
        1e-3,
        description="ε: the label prefers y_t with probability 1-ε; the margin aimed at is log((1-ε)/ε)",
        source="TRL's DPO trainer (exo_pair)",
        gt=0,
        lt=0.5,
    )
    aggregation: Literal["sum", "mean"] = setting(
        "sum", description="log-ratios of whole responses, or per token", source="EXO and TRL: sums"
    )


class DPKDEXOLoss(PairLoss[DPKDEXOConfig]):
    """`KL([σ(m), σ(-m)] ‖ [1-ε, ε])`, `m = β (log q/p(y_t) - log q/p(y_s))`."""

    def forward(self, x: PairInputs) -> Tensor:
        c = self.config
        ratio_t = aggregate(x.student.chosen - x.teacher.chosen, x.lengths.chosen, c.aggregation)
        ratio_s = aggregate(x.student.rejected - x.teacher.rejected, x.lengths.rejected, c.aggregation)
        margin = c.beta * (ratio_t - ratio_s)
        # log σ(m) is -preference(m).
        right = margin.sigmoid() * (-preference(margin) - math.log1p(-c.label_smoothing))
        wrong = (-margin).sigmoid() * (-preference(-margin) - math.log(c.label_smoothing))
        return right + wrong


SPEC = LossSpec(
    name="dpkd-exo",
    loss=DPKDEXOLoss,
    config=DPKDEXOConfig,
    card=Card(
        title="DPKD, EXO form",
        summary="Reverse KL between the student's preference and a label that is nearly sure: a bounded loss.",
        formula="σ(m)·log(σ(m)/(1-ε)) + σ(-m)·log(σ(-m)/ε),  m = β·(log(q(yₜ)/p(yₜ)) - log(q(yₛ)/p(yₛ)))",
        sources=(at(EXO, "Eq. 16"), at(TRL_PREFERENCE, "DPOTrainer, loss_type exo_pair"), at(DPKD, "Eq. 6: m")),
        use_when="Margins should come to rest: the loss is 0 at m = log((1-ε)/ε), 6.9 for ε = 0.001, and pulls larger "
        "ones back.",
        avoid_when="The student ranks many pairs the wrong way round by far (m below about -5): the gradient has the "
        "factor σ(m)·σ(-m) and dies there, just where dpkd's is largest. Start from an SFT student.",
        notes="EXO's proof is for responses all drawn from the reference. Here yₛ comes from the student and the "
        "reference is the teacher, so that what is left is the bounded shape, not the proof. Never above -log ε. TRL "
        "replaces ε = 0 by 0.001; here 0 is refused. Per token (mean) with β = 0.1 the margin of 6.9 is out of reach. "
        "Costs what dpkd costs: two responses per prompt through student and teacher, about twice kd, and sampling.",
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
