"""DPKD for mislabeled pairs: robust DPO (Ray Chowdhury et al., 2403.00409) with the teacher as reference.

When a share ε of the pairs is mislabeled (the student's response was the better one), the expectation of this loss
over the noise is the loss of the correct pairs: (1-ε) ℓ̂(m) + ε ℓ̂(-m) = -log σ(m).
"""

from __future__ import annotations

from torch import Tensor

from dpkd.api import Card, LossConfig, LossSpec, PairInputs, PairLoss, hookimpl, setting
from dpkd.functional import preference
from dpkd_zoo import pairs
from dpkd_zoo.papers import DPKD, RDPO, TRL_PREFERENCE, at


class DPKDRobustConfig(LossConfig):
    """Strength, the share of mislabeled pairs, length normalization."""

    beta: float = setting(
        0.1, description="β of the implicit reward", source="released arguments.py of DPKD; TRL", gt=0
    )
    flipped: float = setting(
        0.1,
        description="ε: share of mislabeled pairs",
        source="rDPO §6, by TRL (TRL's label_smoothing is 0 by default: dpkd)",
        ge=0,
        lt=0.5,
    )
    aggregation: pairs.Aggregation = pairs.aggregation("mean", "DPKD Eq. 9 (TRL: sum)")


class DPKDRobustLoss(PairLoss[DPKDRobustConfig]):
    """`[-(1-ε) log σ(m) + ε log σ(-m)] / (1-2ε)`, `m = β (log q/p(y_t) - log q/p(y_s))`."""

    def forward(self, x: PairInputs) -> Tensor:
        c = self.config
        margin = c.beta * pairs.margin(x, x.teacher, c.aggregation)
        right, wrong = preference(margin), preference(-margin)
        return ((1 - c.flipped) * right - c.flipped * wrong) / (1 - 2 * c.flipped)


SPEC = LossSpec(
    name="dpkd-robust",
    loss=DPKDRobustLoss,
    config=DPKDRobustConfig,
    card=Card(
        title="DPKD, robust to mislabeled pairs",
        summary="An unbiased preference loss when a known share of the student's responses beats the teacher's.",
        formula="(-(1-ε)·log σ(m) + ε·log σ(-m)) / (1-2ε),  m = β/|yₜ|·log(q(yₜ)/p(yₜ)) - β/|yₛ|·log(q(yₛ)/p(yₛ))",
        sources=(
            at(RDPO, "the rDPO loss, as quoted in TRL's docs/source/paper_index.md"),
            at(DPKD, "Eq. 9"),
            at(TRL_PREFERENCE, "DPOTrainer, loss_type robust (trl/trainer/dpo_trainer.py)"),
        ),
        use_when="Pairs are labeled by who wrote them, not by a judge, and you can say how often the student's "
        "response is the better one.",
        avoid_when="ε is a guess, or the run is long: the loss falls without bound as the margin grows, and its "
        "gradient never vanishes. dpkd with label_smoothing is the careful choice: biased, but with a minimum at a "
        "finite margin.",
        notes="Not label smoothing, whose second part has the other sign: its minimum is at m = log((1-ε)/ε), this "
        "one's at ∞. Values may be negative. ε = 0 is dpkd. TRL calls ε label_smoothing in both. Costs the same as "
        "dpkd: two responses per prompt through student and teacher, about twice kd, plus sampling.",
        latex=r"\frac{-(1-\varepsilon)\log\sigma(m)+\varepsilon\log\sigma(-m)}{1-2\varepsilon}, \qquad "
        r"m=\frac{\beta}{|y_t|}\log\frac{q(y_t)}{p(y_t)}-\frac{\beta}{|y_s|}\log\frac{q(y_s)}{p(y_s)}",
    ),
    reads=pairs.STUDENT_AND_TEACHER,
    reward_scale=lambda config: config.beta,
    suggests=pairs.WITH_LM_TERM,
)


@hookimpl
def dpkd_losses() -> list[LossSpec]:
    return [SPEC]
