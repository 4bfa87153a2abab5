"""Direct preference optimization (Rafailov et al., 2305.18290), with the student before training as reference.

For distillation: the teacher's response is chosen, the student's rejected. `dpkd` is the same loss with the teacher as
reference.
"""

from __future__ import annotations

from torch import Tensor

from dpkd.api import Card, LossConfig, LossSpec, PairInputs, PairLoss, Signal, Trait, hookimpl, setting
from dpkd.functional import preference
from dpkd_zoo import pairs
from dpkd_zoo.papers import DPO, TRL_PREFERENCE, at


class DPOConfig(LossConfig):
    """Strength, length normalization and label noise."""

    beta: float = setting(0.1, description="β of the implicit reward", source="DPO Appendix B, by TRL", gt=0)
    aggregation: pairs.Aggregation = pairs.aggregation("sum", "DPO Eq. 7 (TRL's sigmoid_norm: mean)")
    label_smoothing: float = setting(
        0.0, description="share of pairs assumed to be mislabeled", source="TRL (DPO: none)", ge=0, lt=0.5
    )


class DPOLoss(PairLoss[DPOConfig]):
    """`-log σ(β log q(y_t)/q₀(y_t) - β log q(y_s)/q₀(y_s))`, q₀ the student at the start."""

    def forward(self, x: PairInputs) -> Tensor:
        c = self.config
        return preference(c.beta * pairs.margin(x, x.reference, c.aggregation), c.label_smoothing)


SPEC = LossSpec(
    name="dpo",
    loss=DPOLoss,
    config=DPOConfig,
    card=Card(
        title="DPO on teacher-over-student pairs",
        summary="Preference of the teacher's response over the student's, with the initial student as reference.",
        formula="-log σ(β·log(q(yₜ)/q₀(yₜ)) - β·log(q(yₛ)/q₀(yₛ))),  q₀ the student at the start of the run",
        sources=(at(DPO, "Eq. 7"), at(TRL_PREFERENCE, "DPOTrainer, loss_type sigmoid")),
        use_when="Only the teacher's text is available, and the student should stay near where it started (an SFT "
        "student). Also for any set of preference pairs (text.source=preference).",
        avoid_when="The initial student is not a good reference (it was not fine-tuned), or the teacher can score: "
        "dpkd pulls towards the teacher, dadpo towards both.",
        notes="The first loss of a run is log 2 for every pair, since q = q₀. Nothing keeps log q(yₜ) up by itself: "
        "both likelihoods may fall (see dpkd-dpop). DistiLLM-2 (Table 12) reran it for distillation: Rouge-L 23.4, "
        "against 6.4 for its form of dpkd. Costs two responses per prompt through the student and, without gradient, "
        "through its copy: about twice sft, a second student in memory, plus sampling.",
        latex=r"-\log\sigma\Big(\beta\log\frac{q(y_t)}{q_0(y_t)}-\beta\log\frac{q(y_s)}{q_0(y_s)}\Big), \qquad "
        r"q_0\text{ the student at the start}",
    ),
    reads=pairs.STUDENT | {Signal.REFERENCE_LOGPS},
    reward_scale=lambda config: config.beta,
    suggests={"text": {"source": "pairs", "chosen": "teacher", "rejected": "student", "refresh": "once"}},
    traits=frozenset({Trait.NON_NEGATIVE}),
)


@hookimpl
def dpkd_losses() -> list[LossSpec]:
    return [SPEC]
