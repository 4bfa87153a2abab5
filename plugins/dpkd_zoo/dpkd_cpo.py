"""CPO form of DPKD (Table 2 of 2406.19774; Xu et al., 2401.08417): no reference, plus likelihood of the chosen.

The paper prints `β log q(y_t)/q(y_t)`, which is 0 for every model; the denominator must be q(y_s).
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from dpkd.api import Card, LossConfig, LossSpec, PairInputs, PairLoss, Signal, Trait, hookimpl, setting
from dpkd.functional import aggregate, preference
from dpkd_zoo.papers import CPO, DPKD, at


class DPKDCPOConfig(LossConfig):
    """Preference, and the likelihood term."""

    beta: float = setting(0.1, description="β of the preference", source="TRL's CPO trainer (DPKD: none)", gt=0)
    aggregation: Literal["sum", "mean"] = setting(
        "sum",
        description="log-probs in the preference: of whole responses, or per token",
        source="DPKD Table 2 caption",
    )
    nll_weight: float = setting(
        1.0, description="weight of -log q(y_t)", source="DPKD Table 2 caption; TRL's cpo_alpha", ge=0
    )
    nll_aggregation: Literal["sum", "mean"] = setting(
        "sum",
        description="log-prob in the likelihood term: of the whole response, or per token",
        source="DPKD Table 2 caption (TRL: mean over tokens)",
    )


class DPKDCPOLoss(PairLoss[DPKDCPOConfig]):
    """`-log σ(β log q(y_t) - β log q(y_s)) - w log q(y_t)`."""

    def forward(self, x: PairInputs) -> Tensor:
        c = self.config
        logp_t = aggregate(x.student.chosen, x.lengths.chosen, c.aggregation)
        logp_s = aggregate(x.student.rejected, x.lengths.rejected, c.aggregation)
        likelihood = aggregate(x.student.chosen, x.lengths.chosen, c.nll_aggregation)
        chosen = x.part("preference", preference(c.beta * (logp_t - logp_s)))
        return chosen - c.nll_weight * x.part("log_likelihood", likelihood)


SPEC = LossSpec(
    name="dpkd-cpo",
    loss=DPKDCPOLoss,
    config=DPKDCPOConfig,
    card=Card(
        title="DPKD, CPO form",
        summary="Preference by the student's own log-probs, plus likelihood of the teacher's response.",
        formula="-log σ(β·log q(yₜ) - β·log q(yₛ)) - log q(yₜ)",
        sources=(at(DPKD, "Table 2"), at(CPO, "§3: preference plus likelihood")),
        use_when="Teacher log-probs are not to be had (text only), or cost too much.",
        avoid_when="The teacher can score: the reference keeps the student near it.",
        notes="The paper's formula has q(yₜ) in the denominator, a slip of the pen for q(yₛ). The likelihood of the "
        "teacher's response is inside, so that no LM term is needed. TRL averages the likelihood over tokens.",
    ),
    reads=frozenset({Signal.STUDENT_LOGPS, Signal.LENGTHS}),
    suggests={"text": {"source": "pairs", "chosen": "teacher", "rejected": "student", "refresh": "every_step"}},
    traits=frozenset({Trait.NON_NEGATIVE}),
)


@hookimpl
def dpkd_losses() -> list[LossSpec]:
    """This module's loss."""
    return [SPEC]
