"""Direct preference knowledge distillation (2406.19774), Eq. 8 and 9: prefer the teacher's response to the student's.

It is DPO with the teacher as the reference, the teacher's response as chosen and the student's as rejected.
"""

from __future__ import annotations

from torch import Tensor

from dpkd.api import Card, LossConfig, LossSpec, PairInputs, PairLoss, Trait, hookimpl, setting
from dpkd.functional import preference
from dpkd_zoo import pairs
from dpkd_zoo.papers import DPKD, DPKD_CODE, at


class DPKDConfig(LossConfig):
    """Strength, length normalization and label noise."""

    beta: float = setting(
        0.1, description="β of the implicit reward", source="released arguments.py (paper: none)", gt=0
    )
    aggregation: pairs.Aggregation = pairs.aggregation("mean", "Eq. 9 and Algorithm 1, line 5 (Eq. 8: sum)")
    label_smoothing: float = setting(
        0.0, description="share of pairs assumed to be mislabeled", source="released arguments.py", ge=0, lt=0.5
    )


class DPKDLoss(PairLoss[DPKDConfig]):
    """`-log σ(r̂(y_t) - r̂(y_s))` with `r̂(y) = β log q(y)/p(y)`, divided by |y| in Eq. 9."""

    def forward(self, x: PairInputs) -> Tensor:
        c = self.config
        return preference(c.beta * pairs.margin(x, x.teacher, c.aggregation), c.label_smoothing)


SPEC = LossSpec(
    name="dpkd",
    loss=DPKDLoss,
    config=DPKDConfig,
    card=Card(
        title="DPKD, the paper's objective",
        summary="Preference of the teacher's response over the student's, with the teacher as reference.",
        formula="-log σ(β/|yₜ|·log(q(yₜ)/p(yₜ)) - β/|yₛ|·log(q(yₛ)/p(yₛ)))",
        sources=(at(DPKD, "Eq. 8, Eq. 9, Algorithm 1"), at(DPKD_CODE, "main.py: another objective, see dpkd-token")),
        use_when="You want preference distillation as the paper states it, on pairs of one response by each model.",
        avoid_when="Without an LM or pre-training term: a rerun in DistiLLM-2 (Table 12) collapsed to Rouge-L 6.4, "
        "because log q(yₛ) can fall without bound. Start from an SFT student.",
        notes="The paper adds λ·L_pt on a pre-training corpus and gives no value for λ: set terms.pretrain.weight and "
        "a corpus. By default the LM term on data-set responses replaces it, with weight 1: the released script also "
        "weighs cross-entropy and preference equally. Algorithm 1 samples the student's response again at every step; "
        "text.refresh=per_epoch or once is cheaper. Eq. 11 and 30 print the weight of the gradient inverted; the "
        "gradient of Eq. 8 has σ(r̂(yₛ) - r̂(yₜ)). On fresh pairs the mean gradient of Eq. 8 is that of seqkd exactly at "
        "β = 1, and in proportion to it for a small β or where no pair is won (docs/results.md): it imitates the "
        "teacher's text as that is sampled, so sample it cooler than at temperature 1. The released code "
        "implements another objective: dpkd-token.",
        latex=r"-\log\sigma\Big(\frac{\beta}{|y_t|}\log\frac{q(y_t)}{p(y_t)} - \frac{\beta}{|y_s|}"
        r"\log\frac{q(y_s)}{p(y_s)}\Big)",
    ),
    reads=pairs.STUDENT_AND_TEACHER,
    reward_scale=lambda config: config.beta,
    suggests=pairs.WITH_LM_TERM,
    traits=frozenset({Trait.NON_NEGATIVE}),
)


@hookimpl
def dpkd_losses() -> list[LossSpec]:
    return [SPEC]
