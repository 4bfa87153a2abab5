"""IPO form of DPKD (Table 2 of 2406.19774; Azar et al., 2310.12036): a margin of 1/(2τ), not as large as possible."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from dpkd.api import Card, LossConfig, LossSpec, PairInputs, PairLoss, Signal, Trait, hookimpl, setting
from dpkd.functional import aggregate
from dpkd_zoo.papers import DPKD, IPO, at


class DPKDIPOConfig(LossConfig):
    """The margin."""

    tau: float = setting(
        0.1, description="τ: the margin aimed at is 1/(2τ) nats", source="TRL's DPO trainer (DPKD: none)", gt=0
    )
    aggregation: Literal["sum", "mean"] = setting(
        "sum", description="log-probs of whole responses, or per token", source="DPKD Table 2 caption (TRL: mean)"
    )


class DPKDIPOLoss(PairLoss[DPKDIPOConfig]):
    """`(log q/p(y_t) - log q/p(y_s) - 1/(2τ))²`."""

    def forward(self, x: PairInputs) -> Tensor:
        how = self.config.aggregation
        ratio_t = aggregate(x.student.chosen - x.teacher.chosen, x.lengths.chosen, how)
        ratio_s = aggregate(x.student.rejected - x.teacher.rejected, x.lengths.rejected, how)
        return (ratio_t - ratio_s - 1 / (2 * self.config.tau)) ** 2


SPEC = LossSpec(
    name="dpkd-ipo",
    loss=DPKDIPOLoss,
    config=DPKDIPOConfig,
    card=Card(
        title="DPKD, IPO form",
        summary="A squared distance of the margin from 1/(2τ): bounded where DPKD's sigmoid is not.",
        formula="(log(q(yₜ)/p(yₜ)) - log(q(yₛ)/p(yₛ)) - 1/(2τ))²",
        sources=(at(DPKD, "Table 2"), at(IPO, "Eq. 17")),
        use_when="Margins run away under dpkd.",
        avoid_when="Rouge-L is the aim: the paper reports 18.78 for it against DPKD's 24.62.",
        notes="DPKD prints sums; TRL averages over tokens, which makes 1/(2τ) a margin per token. DPKD names no τ.",
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
