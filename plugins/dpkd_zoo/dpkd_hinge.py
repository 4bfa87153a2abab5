"""Hinge form of DPKD: SLiC's calibration (Zhao et al., 2305.10425), the teacher its reference (as in RSO, 2309.06657).

A pair whose margin has reached 1/β gives no gradient any more: the loss does not push for ever.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from dpkd.api import Card, LossConfig, LossSpec, PairInputs, PairLoss, Signal, Trait, hookimpl, setting
from dpkd.functional import aggregate
from dpkd_zoo.papers import RSO, SLIC, TRL_PREFERENCE, at


class DPKDHingeConfig(LossConfig):
    """The margin, and what it is measured against."""

    beta: float = setting(
        0.1, description="β: the margin aimed at is 1/β nats", source="TRL's DPO trainer (SLiC: margin δ)", gt=0
    )
    reference: Literal["teacher", "none"] = setting(
        "teacher", description="log q/p, or log q alone as in SLiC", source="DPKD Eq. 6; RSO (SLiC: none)"
    )
    aggregation: Literal["sum", "mean"] = setting(
        "sum", description="log-probs of whole responses, or per token", source="SLiC and TRL: sums"
    )


class DPKDHingeLoss(PairLoss[DPKDHingeConfig]):
    """`max(0, 1 - β (r(y_t) - r(y_s)))` with `r = log q/p` or `log q`."""

    def forward(self, x: PairInputs) -> Tensor:
        c = self.config
        logp_t, logp_s = x.student
        if c.reference == "teacher":
            logp_t, logp_s = logp_t - x.teacher.chosen, logp_s - x.teacher.rejected
        reward_t = aggregate(logp_t, x.lengths.chosen, c.aggregation)
        reward_s = aggregate(logp_s, x.lengths.rejected, c.aggregation)
        return torch.relu(1 - c.beta * x.part("margin", reward_t - reward_s))


def _reads(config: DPKDHingeConfig) -> frozenset[Signal]:
    teacher = {Signal.TEACHER_LOGPS} if config.reference == "teacher" else set()
    return frozenset({Signal.STUDENT_LOGPS, Signal.LENGTHS, *teacher})


SPEC = LossSpec(
    name="dpkd-hinge",
    loss=DPKDHingeLoss,
    config=DPKDHingeConfig,
    card=Card(
        title="DPKD, hinge form",
        summary="A pair counts until its margin has reached 1/β, and not at all after.",
        formula="max(0, 1 - β·(log(q(yₜ)/p(yₜ)) - log(q(yₛ)/p(yₛ))))",
        sources=(
            at(SLIC, "the calibration loss, max(0, δ - log q(y⁺) + log q(y⁻)) (from memory)"),
            at(RSO, "hinge-norm: log-ratios to a reference (from memory)"),
            at(TRL_PREFERENCE, "DPOTrainer, loss_type hinge"),
        ),
        use_when="Margins run away under dpkd: pairs that are in order already leave the gradient to the others.",
        avoid_when="Log-probs per token (aggregation=mean) with a small β: no margin per token comes near 1/β = 10 "
        "nats, so that the hinge never closes.",
        notes="reference=none is SLiC with δ = 1/β, up to the factor β; SLiC adds a likelihood term on a target, here "
        "terms.lm on data-set responses (weight 1 by default). At 1 - β·margin = 0 the gradient is 0. Costs two "
        "responses per prompt through student and (reference=teacher) teacher, about twice kd, and sampling.",
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
