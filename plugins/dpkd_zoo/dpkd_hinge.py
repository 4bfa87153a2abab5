"""Hinge form of DPKD: SLiC's calibration (Zhao et al., 2305.10425) with the teacher as reference (RSO, 2309.06657).

A pair whose margin has reached 1/β gives no gradient any more, so margins do not grow forever.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from dpkd.api import Card, LossConfig, LossSpec, PairInputs, PairLoss, Signal, Trait, hookimpl, setting
from dpkd_zoo import pairs
from dpkd_zoo.papers import RSO, SLIC, TRL_PREFERENCE, at


class DPKDHingeConfig(LossConfig):
    """The margin, and its reference."""

    beta: float = setting(
        0.1, description="β: the target margin is 1/β nats", source="TRL's DPO trainer (SLiC: margin δ)", gt=0
    )
    reference: Literal["teacher", "none"] = setting(
        "teacher", description="log q/p, or log q alone as in SLiC", source="DPKD Eq. 6; RSO (SLiC: none)"
    )
    aggregation: pairs.Aggregation = pairs.aggregation("sum", "SLiC and TRL: sums", "log-probs")


class DPKDHingeLoss(PairLoss[DPKDHingeConfig]):
    """`max(0, 1 - β (r(y_t) - r(y_s)))` with `r = log q/p` or `log q`."""

    def forward(self, x: PairInputs) -> Tensor:
        c = self.config
        reference = x.teacher if c.reference == "teacher" else None
        return torch.relu(1 - c.beta * x.part("margin", pairs.margin(x, reference, c.aggregation)))


def _reads(config: DPKDHingeConfig) -> frozenset[Signal]:
    return pairs.STUDENT_AND_TEACHER if config.reference == "teacher" else pairs.STUDENT


SPEC = LossSpec(
    name="dpkd-hinge",
    loss=DPKDHingeLoss,
    config=DPKDHingeConfig,
    card=Card(
        title="DPKD, hinge form",
        summary="A pair counts until its margin has reached 1/β, and not at all after.",
        formula="max(0, 1 - β·(log(q(yₜ)/p(yₜ)) - log(q(yₛ)/p(yₛ))))",
        sources=(
            at(SLIC, "§2, the calibration loss max(0, δ - log q(y⁺) + log q(y⁻))"),
            at(RSO, "hinge-norm: log-ratios to a reference, as quoted in TRL's docs/source/paper_index.md"),
            at(TRL_PREFERENCE, "DPOTrainer, loss_type hinge (trl/trainer/dpo_trainer.py)"),
        ),
        use_when="Margins run away with dpkd: pairs that are in order leave the gradient to the others.",
        avoid_when="Log-probs per token (aggregation=mean) with a small β: no margin per token reaches 1/β = 10 nats, "
        "so the hinge never closes.",
        notes="reference=none is SLiC with δ = 1/β, up to the factor β; SLiC adds a likelihood term on a target, here "
        "terms.lm on data-set responses (weight 1 by default). At 1 - β·margin = 0 the gradient is 0. Costs two "
        "responses per prompt through the student and (reference=teacher) the teacher, about twice kd, plus sampling.",
        latex=r"\max\Big(0,\,1-\beta\Big(\log\frac{q(y_t)}{p(y_t)}-\log\frac{q(y_s)}{p(y_s)}\Big)\Big)",
    ),
    reads=_reads,
    reward_scale=lambda config: config.beta,
    suggests=pairs.WITH_LM_TERM,
    traits=frozenset({Trait.NON_NEGATIVE}),
)


@hookimpl
def dpkd_losses() -> list[LossSpec]:
    return [SPEC]
