"""Distribution-aware DPO (Zhang et al., 2506.15717): two references, the student before training and the teacher.

With β₂ = 0 it would be `dpo`, with β₁ = 0 `dpkd` with sums.
"""

from __future__ import annotations

from torch import Tensor

from dpkd.api import Card, LossConfig, LossSpec, PairInputs, PairLoss, Signal, Trait, hookimpl, setting
from dpkd.functional import preference
from dpkd_zoo import pairs
from dpkd_zoo.papers import DADPO, DPO, at


class DaDPOConfig(LossConfig):
    """A strength for each reference, and length normalization."""

    beta_start: float = setting(
        0.1,
        description="β₁: strength of the initial student as reference",
        source="DPO's β (daDPO's value not confirmed)",
        gt=0,
    )
    beta_teacher: float = setting(
        0.1,
        description="β₂: strength of the teacher as reference",
        source="our choice: as β₁ (daDPO's value not confirmed)",
        gt=0,
    )
    aggregation: pairs.Aggregation = pairs.aggregation("sum", "DPO Eq. 7")


class DaDPOLoss(PairLoss[DaDPOConfig]):
    """`-log σ(β₁ [log q/q₀(y_t) - log q/q₀(y_s)] + β₂ [log q/p(y_t) - log q/p(y_s)])`."""

    def forward(self, x: PairInputs) -> Tensor:
        c = self.config
        start = x.part("margin_start", c.beta_start * pairs.margin(x, x.reference, c.aggregation))
        teacher = x.part("margin_teacher", c.beta_teacher * pairs.margin(x, x.teacher, c.aggregation))
        return preference(start + teacher)


SPEC = LossSpec(
    name="dadpo",
    loss=DaDPOLoss,
    config=DaDPOConfig,
    card=Card(
        title="daDPO: DPO with two references",
        summary="Preference of the teacher's response, relative to the initial student and to the teacher.",
        formula="-log σ(β₁·Δ log(q/q₀) + β₂·Δ log(q/p)),  Δ f = f(yₜ) - f(yₛ),  q₀ the student at the start of the run",
        sources=(
            at(DADPO, "Eq. 10 (not confirmed: the structure is from a description of it)"),
            at(DPO, "Eq. 7: the part with q₀"),
        ),
        use_when="The teacher can score and the student was fine-tuned: dpkd's pull towards the teacher, balanced by "
        "dpo's towards the start.",
        avoid_when="There is no memory for a third model: use dpkd or dpo.",
        notes="The paper's pairs are sampled once, before training (text.refresh=once, the default here). As log q "
        "counts in both parts, the total strength is β₁ + β₂. Costs two responses per prompt through the student, its "
        "copy and the teacher: about three times kd, a second student in memory, plus sampling.",
        latex=r"-\log\sigma\Big(\beta_1\,\Delta\log\frac{q}{q_0}+\beta_2\,\Delta\log\frac{q}{p}\Big), \qquad \Delta "
        r"f=f(y_t)-f(y_s)",
        unconfirmed="The structure follows a published description of Eq. 10, not the paper itself; the values of β₁ "
        "and β₂ are unknown. Check the paper before you publish with it.",
    ),
    reads=pairs.STUDENT_AND_TEACHER | {Signal.REFERENCE_LOGPS},
    suggests={"text": {"source": "pairs", "chosen": "teacher", "rejected": "student", "refresh": "once"}},
    traits=frozenset({Trait.NON_NEGATIVE}),
)


@hookimpl
def dpkd_losses() -> list[LossSpec]:
    return [SPEC]
