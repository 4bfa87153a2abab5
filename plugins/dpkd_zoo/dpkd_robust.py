"""DPKD that knows of wrong pairs: robust DPO (Ray Chowdhury et al., 2403.00409) with the teacher as reference.

When a share ε of the pairs is the wrong way round (the student's response was the better one), the expectation of this
loss over the noise is the loss of the right pairs: (1-ε) ℓ̂(m) + ε ℓ̂(-m) = -log σ(m).
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from dpkd.api import Card, LossConfig, LossSpec, PairInputs, PairLoss, Signal, hookimpl, setting
from dpkd.functional import aggregate, preference
from dpkd_zoo.papers import DPKD, RDPO, TRL_PREFERENCE, at


class DPKDRobustConfig(LossConfig):
    """Strength, the share of wrong pairs, length normalisation."""

    beta: float = setting(
        0.1, description="β of the implicit reward", source="released arguments.py of DPKD; TRL", gt=0
    )
    flipped: float = setting(
        0.1,
        description="ε: share of pairs that are the wrong way round",
        source="our choice (TRL's label_smoothing: 0, which is dpkd)",
        ge=0,
        lt=0.5,
    )
    aggregation: Literal["mean", "sum"] = setting(
        "mean", description="mean: log-ratios per token; sum: of whole responses", source="DPKD Eq. 9 (TRL: sum)"
    )


class DPKDRobustLoss(PairLoss[DPKDRobustConfig]):
    """`[-(1-ε) log σ(m) + ε log σ(-m)] / (1-2ε)`, `m = β (log q/p(y_t) - log q/p(y_s))`."""

    def forward(self, x: PairInputs) -> Tensor:
        c = self.config
        reward_t = aggregate(x.student.chosen - x.teacher.chosen, x.lengths.chosen, c.aggregation)
        reward_s = aggregate(x.student.rejected - x.teacher.rejected, x.lengths.rejected, c.aggregation)
        margin = c.beta * (reward_t - reward_s)
        right, wrong = preference(margin), preference(-margin)
        return ((1 - c.flipped) * right - c.flipped * wrong) / (1 - 2 * c.flipped)


SPEC = LossSpec(
    name="dpkd-robust",
    loss=DPKDRobustLoss,
    config=DPKDRobustConfig,
    card=Card(
        title="DPKD, robust to wrong pairs",
        summary="An unbiased preference loss when a known share of the student's responses beats the teacher's.",
        formula="(-(1-ε)·log σ(m) + ε·log σ(-m)) / (1-2ε),  m = β/|yₜ|·log(q(yₜ)/p(yₜ)) - β/|yₛ|·log(q(yₛ)/p(yₛ))",
        sources=(
            at(RDPO, "§3, the rDPO loss (Eq. 12, from memory)"),
            at(DPKD, "Eq. 9"),
            at(TRL_PREFERENCE, "DPOTrainer, loss_type robust"),
        ),
        use_when="Pairs were made by writer, not by a judge, and you can say how often the student's response is the "
        "better one.",
        avoid_when="ε is a guess, or the run is long: the loss falls without bound as the margin grows, and its "
        "gradient never vanishes. dpkd with label_smoothing is the careful way: biased, but with a lowest point at a "
        "finite margin.",
        notes="Not label smoothing, whose second part has the other sign: that one aims at m = log((1-ε)/ε), this one "
        "at ∞. Values may be negative. ε = 0 is dpkd. TRL calls ε label_smoothing in both. Costs what dpkd costs: two "
        "responses per prompt through student and teacher, about twice kd, and sampling.",
    ),
    reads=frozenset({Signal.STUDENT_LOGPS, Signal.TEACHER_LOGPS, Signal.LENGTHS}),
    suggests={
        "text": {"source": "pairs", "chosen": "teacher", "rejected": "student", "refresh": "every_step"},
        "terms": {"lm": {"weight": 1.0}},
    },
)


@hookimpl
def dpkd_losses() -> list[LossSpec]:
    """This module's loss."""
    return [SPEC]
