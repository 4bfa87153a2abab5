"""SimPO form of DPKD (Table 2 of 2406.19774; Meng et al., 2405.14734): length-normalized, no reference, margin γ."""

from __future__ import annotations

from torch import Tensor

from dpkd.api import Card, LossConfig, LossSpec, PairInputs, PairLoss, Trait, hookimpl, setting
from dpkd.functional import preference
from dpkd_zoo import pairs
from dpkd_zoo.papers import DPKD, SIMPO, at


class DPKDSimPOConfig(LossConfig):
    """Strength and margin."""

    beta: float = setting(
        2.0, description="β of the reward per token", source="SimPO trains with 2.0 to 2.5 (TRL: 0.1; DPKD: none)", gt=0
    )
    gamma: float = setting(
        1.0,
        description="γ: margin that the chosen reward should have",
        source="SimPO: γ/β 0.3 to 0.8 (TRL: γ 0.5)",
        ge=0,
    )


class DPKDSimPOLoss(PairLoss[DPKDSimPOConfig]):
    """`-log σ(β/|y_t| log q(y_t) - β/|y_s| log q(y_s) - γ)`."""

    def forward(self, x: PairInputs) -> Tensor:
        return preference(self.config.beta * pairs.margin(x, None, "mean") - self.config.gamma)


SPEC = LossSpec(
    name="dpkd-simpo",
    loss=DPKDSimPOLoss,
    config=DPKDSimPOConfig,
    card=Card(
        title="DPKD, SimPO form",
        summary="The student's own log-prob per token as the reward, with a margin; no reference.",
        formula="-log σ(β/|yₜ|·log q(yₜ) - β/|yₛ|·log q(yₛ) - γ)",
        sources=(at(DPKD, "Table 2"), at(SIMPO, "Eq. 6")),
        use_when="Teacher log-probs are not available, and the length of responses must not matter.",
        avoid_when="Without an LM term: nothing else keeps the likelihood of the teacher's response up.",
        notes="DPKD gives neither β nor γ. A small β (TRL's 0.1) leaves σ in its linear part. The LM term on data-set "
        "responses is on by default (weight 1).",
        latex=r"-\log\sigma\Big(\frac{\beta}{|y_t|}\log q(y_t)-\frac{\beta}{|y_s|}\log q(y_s)-\gamma\Big)",
    ),
    reads=pairs.STUDENT,
    reward_scale=lambda config: config.beta,
    suggests=pairs.WITH_LM_TERM,
    traits=frozenset({Trait.NON_NEGATIVE}),
)


@hookimpl
def dpkd_losses() -> list[LossSpec]:
    return [SPEC]
