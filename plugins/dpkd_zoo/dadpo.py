"""Distribution-aware DPO (Zhang et al., 2506.15717): two anchors, the student's own start and the teacher.

With β₂ = 0 it would be `dpo`, with β₁ = 0 `dpkd` with sums.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from dpkd.api import Card, LossConfig, LossSpec, Pair, PairInputs, PairLoss, Signal, Trait, hookimpl, setting
from dpkd.functional import aggregate, preference
from dpkd_zoo.papers import DADPO, DPO, at


class DaDPOConfig(LossConfig):
    """One strength for each anchor, and length normalisation."""

    beta_start: float = setting(
        0.1,
        description="β₁: strength of the student's start as anchor",
        source="DPO's β (daDPO's is not known to us)",
        gt=0,
    )
    beta_teacher: float = setting(
        0.1,
        description="β₂: strength of the teacher as anchor",
        source="our choice: as β₁ (daDPO's is not known to us)",
        gt=0,
    )
    aggregation: Literal["sum", "mean"] = setting(
        "sum", description="log-ratios of whole responses, or per token", source="DPO Eq. 7"
    )


class DaDPOLoss(PairLoss[DaDPOConfig]):
    """`-log σ(β₁ [log q/q₀(y_t) - log q/q₀(y_s)] + β₂ [log q/p(y_t) - log q/p(y_s)])`."""

    def forward(self, x: PairInputs) -> Tensor:
        c = self.config
        start = x.part("margin_start", c.beta_start * self._gap(x, x.reference))
        teacher = x.part("margin_teacher", c.beta_teacher * self._gap(x, x.teacher))
        return preference(start + teacher)

    def _gap(self, x: PairInputs, anchor: Pair) -> Tensor:
        how = self.config.aggregation
        ratio_t = aggregate(x.student.chosen - anchor.chosen, x.lengths.chosen, how)
        ratio_s = aggregate(x.student.rejected - anchor.rejected, x.lengths.rejected, how)
        return ratio_t - ratio_s


SPEC = LossSpec(
    name="dadpo",
    loss=DaDPOLoss,
    config=DaDPOConfig,
    card=Card(
        title="daDPO: DPO with two anchors",
        summary="Preference of the teacher's response, measured against the student's start and against the teacher.",
        formula="-log σ(β₁·Δ log(q/q₀) + β₂·Δ log(q/p)),  Δ f = f(yₜ) - f(yₛ),  q₀ the student at the start of the run",
        sources=(at(DADPO, "Eq. 10 (second hand: structure only)"), at(DPO, "Eq. 7: the part with q₀")),
        use_when="The teacher can score and the student was fine-tuned: dpkd's pull towards the teacher, held back by "
        "dpo's towards the start.",
        avoid_when="The memory for a third model is not there: take dpkd or dpo.",
        notes="Known to us second hand: structure from a description of Eq. 10, no value of β₁ and β₂; check the "
        "paper before you publish with it. The paper's pairs are drawn once, before training (text.refresh=once, the "
        "default here). As log q counts in both parts, the whole strength is β₁ + β₂. Costs two responses per prompt "
        "through student, its copy and the teacher: about three times kd, a second student in memory, and sampling.",
    ),
    reads=frozenset({Signal.STUDENT_LOGPS, Signal.TEACHER_LOGPS, Signal.REFERENCE_LOGPS, Signal.LENGTHS}),
    suggests={"text": {"source": "pairs", "chosen": "teacher", "rejected": "student", "refresh": "once"}},
    traits=frozenset({Trait.NON_NEGATIVE}),
)


@hookimpl
def dpkd_losses() -> list[LossSpec]:
    """This module's loss."""
    return [SPEC]
