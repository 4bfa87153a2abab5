"""IPO form of DPKD (Table 2 of 2406.19774; Azar et al., 2310.12036): a target margin of 1/(2τ), not the largest one."""

from __future__ import annotations

from torch import Tensor

from dpkd.api import Card, LossConfig, LossSpec, PairInputs, PairLoss, Trait, hookimpl, setting
from dpkd_zoo import pairs
from dpkd_zoo.papers import DPKD, IPO, at


class DPKDIPOConfig(LossConfig):
    """The margin."""

    tau: float = setting(
        0.1, description="τ: the target margin is 1/(2τ) nats", source="TRL's DPO trainer (DPKD: none)", gt=0
    )
    aggregation: pairs.Aggregation = pairs.aggregation("sum", "DPKD Table 2 caption (TRL: mean)")


class DPKDIPOLoss(PairLoss[DPKDIPOConfig]):
    """`(log q/p(y_t) - log q/p(y_s) - 1/(2τ))²`."""

    def forward(self, x: PairInputs) -> Tensor:
        return (pairs.margin(x, x.teacher, self.config.aggregation) - 1 / (2 * self.config.tau)) ** 2


SPEC = LossSpec(
    name="dpkd-ipo",
    loss=DPKDIPOLoss,
    config=DPKDIPOConfig,
    card=Card(
        title="DPKD, IPO form",
        summary="The squared distance of the margin from 1/(2τ): bounded where DPKD's sigmoid is not.",
        formula="(log(q(yₜ)/p(yₜ)) - log(q(yₛ)/p(yₛ)) - 1/(2τ))²",
        sources=(at(DPKD, "Table 2"), at(IPO, "Eq. 17")),
        use_when="Margins run away with dpkd.",
        avoid_when="Rouge-L is the goal: the paper reports 18.78 for it and 24.62 for DPKD.",
        notes="DPKD prints sums; TRL averages over tokens, which makes 1/(2τ) a margin per token. DPKD gives no τ.",
        latex=r"\Big(\log\frac{q(y_t)}{p(y_t)}-\log\frac{q(y_s)}{p(y_s)}-\frac{1}{2\tau}\Big)^2",
    ),
    reads=pairs.STUDENT_AND_TEACHER,
    suggests=pairs.WITH_LM_TERM,
    traits=frozenset({Trait.NON_NEGATIVE}),
)


@hookimpl
def dpkd_losses() -> list[LossSpec]:
    return [SPEC]
