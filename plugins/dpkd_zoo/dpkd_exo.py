"""EXO form of DPKD (Ji et al., 2402.00856): the reverse KL from the student's preference to a smoothed label.

The student prefers y_t with probability σ(m); the label says 1-ε. DPO is the forward KL of the same two Bernoulli
distributions (with ε = 0), so EXO is to DPO what reverse KL is to forward KL.
"""

from __future__ import annotations

import math

from torch import Tensor

from dpkd.api import Card, LossConfig, LossSpec, PairInputs, PairLoss, Trait, hookimpl, setting
from dpkd.functional import preference
from dpkd_zoo import pairs
from dpkd_zoo.papers import DPKD, EXO, TRL_PREFERENCE, at


class DPKDEXOConfig(LossConfig):
    """Strength, and how certain the label is."""

    beta: float = setting(0.1, description="β of the implicit reward", source="TRL's DPO trainer", gt=0)
    label_smoothing: float = setting(
        1e-3,
        description="ε: the label prefers y_t with probability 1-ε; the target margin is log((1-ε)/ε)",
        source="TRL's DPO trainer (exo_pair)",
        gt=0,
        lt=0.5,
    )
    aggregation: pairs.Aggregation = pairs.aggregation("sum", "EXO and TRL: sums")


class DPKDEXOLoss(PairLoss[DPKDEXOConfig]):
    """`KL([σ(m), σ(-m)] ‖ [1-ε, ε])`, `m = β (log q/p(y_t) - log q/p(y_s))`."""

    def forward(self, x: PairInputs) -> Tensor:
        c = self.config
        margin = c.beta * pairs.margin(x, x.teacher, c.aggregation)
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
        summary="Reverse KL between the student's preference and a nearly certain label: a bounded loss.",
        formula="σ(m)·log(σ(m)/(1-ε)) + σ(-m)·log(σ(-m)/ε),  m = β·(log(q(yₜ)/p(yₜ)) - log(q(yₛ)/p(yₛ)))",
        sources=(
            at(EXO, "Eq. 16, as numbered in TRL's code"),
            at(TRL_PREFERENCE, "DPOTrainer, loss_type exo_pair"),
            at(DPKD, "Eq. 6: m"),
        ),
        use_when="Margins should converge: the loss is 0 at m = log((1-ε)/ε), 6.9 for ε = 0.001, and pulls larger "
        "margins back.",
        avoid_when="The student ranks many pairs wrongly by a wide margin (m below about -5): the gradient has the "
        "factor σ(m)·σ(-m) and vanishes there, just where dpkd's is largest. Start from an SFT student.",
        notes="EXO's proof assumes responses drawn from the reference. Here yₛ comes from the student and the "
        "reference is the teacher, so the bounded shape carries over, the proof does not. Never above -log ε. TRL "
        "replaces ε = 0 by 0.001; here 0 is refused. Per token (mean) with β = 0.1 the margin of 6.9 is out of reach. "
        "Costs the same as dpkd: two responses per prompt through student and teacher, about twice kd, plus sampling.",
        latex=r"\sigma(m)\log\frac{\sigma(m)}{1-\varepsilon}+\sigma(-m)\log\frac{\sigma(-m)}{\varepsilon}, \qquad "
        r"m=\beta\Big(\log\frac{q(y_t)}{p(y_t)}-\log\frac{q(y_s)}{p(y_s)}\Big)",
    ),
    reads=pairs.STUDENT_AND_TEACHER,
    reward_scale=lambda config: config.beta,
    suggests=pairs.WITH_LM_TERM,
    traits=frozenset({Trait.NON_NEGATIVE}),
)


@hookimpl
def dpkd_losses() -> list[LossSpec]:
    return [SPEC]
