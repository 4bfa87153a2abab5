"""Direct preference knowledge distillation (2406.19774), Eq. 8 and 9: prefer the teacher's response to the student's.

It is DPO with the teacher as reference, the teacher's response chosen and the student's rejected.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from dpkd.api import Card, LossConfig, LossSpec, PairInputs, PairLoss, Signal, Trait, hookimpl, setting
from dpkd.functional import aggregate, preference
from dpkd_zoo.papers import DPKD, DPKD_CODE, at


class DPKDConfig(LossConfig):
    """Strength, length normalisation and label noise."""

    beta: float = setting(
        0.1, description="β of the implicit reward", source="released arguments.py (paper: none)", gt=0
    )
    aggregation: Literal["mean", "sum"] = setting(
        "mean", description="mean: β/|y| as in Eq. 9; sum: Eq. 8", source="Eq. 9; Algorithm 1, line 5"
    )
    label_smoothing: float = setting(
        0.0, description="share of pairs taken to be the wrong way round", source="released arguments.py", ge=0, lt=0.5
    )


class DPKDLoss(PairLoss[DPKDConfig]):
    """`-log σ(r̂(y_t) - r̂(y_s))` with `r̂(y) = β log q(y)/p(y)`, divided by |y| in Eq. 9."""

    def forward(self, x: PairInputs) -> Tensor:
        how = self.config.aggregation
        reward_t = aggregate(x.student.chosen - x.teacher.chosen, x.lengths.chosen, how)
        reward_s = aggregate(x.student.rejected - x.teacher.rejected, x.lengths.rejected, how)
        return preference(self.config.beta * (reward_t - reward_s), self.config.label_smoothing)


SPEC = LossSpec(
    name="dpkd",
    loss=DPKDLoss,
    config=DPKDConfig,
    card=Card(
        title="DPKD, the paper's objective",
        summary="Preference of the teacher's response over the student's, with the teacher as reference.",
        formula="-log σ(β/|yₜ|·log(q(yₜ)/p(yₜ)) - β/|yₛ|·log(q(yₛ)/p(yₛ)))",
        sources=(at(DPKD, "Eq. 8, Eq. 9, Algorithm 1"), at(DPKD_CODE, "main.py: another objective, see dpkd-token")),
        use_when="You want preference distillation as the paper states it, from pairs that both models write.",
        avoid_when="Alone, without an LM or pre-training term: a re-run in DistiLLM-2 (Table 12) collapsed to Rouge-L "
        "6.4, because pushing log q(yₛ) down is unbounded. Start from an SFT student.",
        notes="The paper adds λ·L_pt on a pre-training corpus and gives λ no value: terms.pretrain.weight with a "
        "corpus. By default the LM term on data-set responses takes its place, with weight 1: the released script too "
        "weighs cross-entropy and preference equally. Algorithm 1 draws the student's response anew at every step; "
        "text.refresh=per_epoch or once is cheaper. Eq. 11 and 30 print the weight of the gradient inverted; it is "
        "σ(r̂(yₛ) - r̂(yₜ)). The released code is another objective: dpkd-token.",
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
