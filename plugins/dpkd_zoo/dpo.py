"""Direct preference optimization (Rafailov et al., 2305.18290), the student's own start as reference.

For distillation: the teacher's response is chosen, the student's rejected. `dpkd` is the same loss with the
teacher as reference.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from dpkd.api import Card, LossConfig, LossSpec, PairInputs, PairLoss, Signal, Trait, hookimpl, setting
from dpkd.functional import aggregate, preference
from dpkd_zoo.papers import DPO, TRL_PREFERENCE, at


class DPOConfig(LossConfig):
    """Strength, length normalisation and label noise."""

    beta: float = setting(0.1, description="β of the implicit reward", source="DPO (from memory); TRL", gt=0)
    aggregation: Literal["sum", "mean"] = setting(
        "sum", description="log-ratios of whole responses, or per token", source="DPO Eq. 7 (TRL's sigmoid_norm: mean)"
    )
    label_smoothing: float = setting(
        0.0, description="share of pairs taken to be the wrong way round", source="TRL (DPO: none)", ge=0, lt=0.5
    )


class DPOLoss(PairLoss[DPOConfig]):
    """`-log σ(β log q(y_t)/q₀(y_t) - β log q(y_s)/q₀(y_s))`, q₀ the student at the start."""

    def forward(self, x: PairInputs) -> Tensor:
        how = self.config.aggregation
        ratio_t = aggregate(x.student.chosen - x.reference.chosen, x.lengths.chosen, how)
        ratio_s = aggregate(x.student.rejected - x.reference.rejected, x.lengths.rejected, how)
        return preference(self.config.beta * (ratio_t - ratio_s), self.config.label_smoothing)


SPEC = LossSpec(
    name="dpo",
    loss=DPOLoss,
    config=DPOConfig,
    card=Card(
        title="DPO on teacher-over-student pairs",
        summary="Preference of the teacher's response over the student's, with the student's start as reference.",
        formula="-log σ(β·log(q(yₜ)/q₀(yₜ)) - β·log(q(yₛ)/q₀(yₛ))),  q₀ the student at the start of the run",
        sources=(at(DPO, "Eq. 7"), at(TRL_PREFERENCE, "DPOTrainer, loss_type sigmoid")),
        use_when="Only the teacher's text is to be had, and the student should stay near where it started (an SFT "
        "student).",
        avoid_when="The start is no good reference (a student that was not fine-tuned), or the teacher can score: "
        "dpkd pulls towards the teacher, dadpo towards both.",
        notes="The first loss of a run is log 2 at every pair, since q = q₀. Nothing holds log q(yₜ) up by itself: "
        "both likelihoods may fall (see dpkd-dpop). DistiLLM-2 (Table 12) re-ran it for distillation: Rouge-L 23.4, "
        "against 6.4 for its form of dpkd. Costs two responses per prompt through the student and, without gradient, "
        "through its copy: about twice sft, a second student in memory, and sampling.",
    ),
    reads=frozenset({Signal.STUDENT_LOGPS, Signal.REFERENCE_LOGPS, Signal.LENGTHS}),
    suggests={"text": {"source": "pairs", "chosen": "teacher", "rejected": "student", "refresh": "once"}},
    traits=frozenset({Trait.NON_NEGATIVE}),
)


@hookimpl
def dpkd_losses() -> list[LossSpec]:
    """This module's loss."""
    return [SPEC]
