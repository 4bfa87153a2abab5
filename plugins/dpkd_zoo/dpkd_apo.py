"""Anchored preference (APO, D'Oosterlinck et al., 2408.06266) with the teacher as the anchor.

DPKD only looks at the difference of two rewards, so both responses may become unlikely. APO looks at each reward by
itself and decides in which direction the likelihood of each response moves.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from dpkd.api import Card, LossConfig, LossSpec, PairInputs, PairLoss, Trait, hookimpl, setting
from dpkd_zoo import pairs
from dpkd_zoo.papers import APO, DPKD, TRL_PREFERENCE, at


class DPKDAPOConfig(LossConfig):
    """Strength, and the direction of the likelihoods."""

    beta: float = setting(0.1, description="β of the implicit reward", source="TRL's DPO trainer", gt=0)
    form: Literal["zero", "down"] = setting(
        "zero",
        description="zero: y_t up, y_s down; down: both down, y_s more (only where the student outdoes y_t)",
        source="APO: zero where the chosen response is better than the model's own",
    )
    aggregation: pairs.Aggregation = pairs.aggregation("sum", "APO and TRL: sums")


class DPKDAPOLoss(PairLoss[DPKDAPOConfig]):
    """zero: `1 - σ(r_t) + σ(r_s)`; down: `σ(r_t) + 1 - σ(r_t - r_s)`; `r = β log q/p`."""

    def forward(self, x: PairInputs) -> Tensor:
        c = self.config
        reward_t, reward_s = (c.beta * ratio for ratio in pairs.log_ratios(x, x.teacher, c.aggregation))
        # 1 - σ(z) is written σ(-z), which keeps its digits where it is small.
        if c.form == "zero":
            return x.part("chosen", (-reward_t).sigmoid()) + x.part("rejected", reward_s.sigmoid())
        return x.part("chosen", reward_t.sigmoid()) + x.part("margin", (reward_s - reward_t).sigmoid())


SPEC = LossSpec(
    name="dpkd-apo",
    loss=DPKDAPOLoss,
    config=DPKDAPOConfig,
    card=Card(
        title="DPKD, anchored (APO)",
        summary="Raises the teacher's response and lowers the student's, each by itself; bounded between 0 and 2.",
        formula="zero: 1 - σ(r(yₜ)) + σ(r(yₛ));  down: σ(r(yₜ)) + 1 - σ(r(yₜ) - r(yₛ));  r(y) = β·log(q(y)/p(y))",
        sources=(
            at(APO, "Eq. 7 (zero) and Eq. 8 (down), as numbered in TRL's code"),
            at(TRL_PREFERENCE, "DPOTrainer, loss_type apo_zero and apo_down"),
            at(DPKD, "Eq. 29: r with the teacher as reference"),
        ),
        use_when="With dpkd the likelihood of the teacher's response falls: form zero raises it for every pair.",
        avoid_when="yₜ is much less likely under the student than under the teacher (β·log q/p below about -5, which "
        "long responses reach quickly): the gradient of its part vanishes with σ'. Lower β, or set aggregation=mean. "
        "Avoid form=down for distillation: it makes the teacher's response less likely, which is right only where the "
        "student writes better than the author of yₜ.",
        notes="APO's anchor is the model before training, so every reward starts at 0, where σ' is largest; with the "
        "teacher as anchor r(yₜ) starts below 0 and r(yₛ) above. Bounded, with a gradient of at most β/4 per "
        "response. Costs the same as dpkd: two responses per prompt through student and teacher, about twice kd, plus "
        "sampling.",
        latex=r"\text{zero: } 1-\sigma(r(y_t))+\sigma(r(y_s)), \qquad \text{down: } "
        r"\sigma(r(y_t))+1-\sigma(r(y_t)-r(y_s)), \qquad r(y)=\beta\log\frac{q(y)}{p(y)}",
    ),
    reads=pairs.STUDENT_AND_TEACHER,
    reward_scale=lambda config: config.beta,
    suggests=pairs.WITH_LM_TERM,
    traits=frozenset({Trait.NON_NEGATIVE}),
)


@hookimpl
def dpkd_losses() -> list[LossSpec]:
    return [SPEC]
