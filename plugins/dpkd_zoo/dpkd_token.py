"""DPKD as its released code computes it: a preference pair of two single tokens at every position.

Under teacher forcing a = argmax p and b = argmax q; `h = [log q(a) - log q(b)] - [log p(a) - log p(b)] ≤ 0`, and the
loss is -log σ(β h). Where the two argmaxes agree it is the constant log 2 without gradient.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from dpkd.api import Card, LossConfig, LossSpec, Signal, TokenInputs, TokenLoss, Trait, hookimpl, setting
from dpkd.functional import at_least_float32, gather_logps, preference
from dpkd_zoo.papers import DPKD, DPKD_CODE, at


class DPKDTokenConfig(LossConfig):
    """The switches of the released script."""

    beta: float = setting(
        0.1, description="β; in the IPO form it is τ", source="released arguments.py: --dpo-beta", gt=0
    )
    form: Literal["sigmoid", "ipo", "dpop"] = setting(
        "sigmoid",
        description="-log σ(βh), (h - 1/(2β))², or sigmoid plus a penalty where q(a) < p(a)",
        source="released main.py: neither --ipo nor --DPOP",
    )
    dpop_weight: float = setting(50.0, description="λ of the DPOP penalty", source="released arguments.py", ge=0)
    reference_free: bool = setting(
        False, description="leave the teacher's log-probs out of h", source="released main.py: --reference-free is off"
    )
    label_smoothing: float = setting(
        0.0, description="share of pairs assumed to be mislabeled", source="released arguments.py", ge=0, lt=0.5
    )


def _log_odds(logits_NV: Tensor, a_N: Tensor, b_N: Tensor) -> Tensor:
    """log of the odds of token a against b: a difference of logits, without a softmax over the vocabulary."""
    return at_least_float32(gather_logps(logits_NV, a_N)) - at_least_float32(gather_logps(logits_NV, b_N))


class DPKDTokenLoss(TokenLoss[DPKDTokenConfig]):
    """`-log σ(β h)` at each position."""

    def forward(self, x: TokenInputs) -> Tensor:
        c = self.config
        q_NV, p_NV = x[Signal.STUDENT_LOGITS], x[Signal.TEACHER_LOGITS]
        a_N, b_N = p_NV.argmax(-1), q_NV.detach().argmax(-1)
        h_N = _log_odds(q_NV, a_N, b_N)
        if not c.reference_free:
            h_N = h_N - _log_odds(p_NV, a_N, b_N)
        x.part("margin", c.beta * h_N)
        x.part("same_choice", (a_N == b_N).float())
        if c.form == "ipo":
            return (h_N - 1 / (2 * c.beta)) ** 2
        loss_N = preference(c.beta * h_N, c.label_smoothing)
        if c.form == "dpop" and c.dpop_weight > 0:
            fallen_N = gather_logps(x.teacher_log_probs(), a_N) - gather_logps(x.student_log_probs(), a_N)
            penalty_N = x.part("penalty", torch.relu(fallen_N))  # relu has no gradient at 0, clamp has
            loss_N = x.part("preference", loss_N) + c.dpop_weight * penalty_N
        return loss_N


SPEC = LossSpec(
    name="dpkd-token",
    loss=DPKDTokenLoss,
    config=DPKDTokenConfig,
    card=Card(
        title="DPKD, the released code's objective",
        summary="At each position of given text: prefer the teacher's likeliest token to the student's.",
        formula="-log σ(β·h),  h = [log q(a) - log q(b)] - [log p(a) - log p(b)],  a = argmax p,  b = argmax q",
        sources=(at(DPKD_CODE, "main.py:193-258"), at(DPKD, "§3 describes another objective: dpkd")),
        use_when="You want to reproduce what the authors' script trains; a light nudge towards the teacher's greedy "
        "choice.",
        avoid_when="You want a strong signal: at β = 0.1 the cross-entropy beside it weighs about ten times as much.",
        notes="Zero gradient where the argmaxes agree, so the loss has a floor of log 2 = 0.693. The script adds 0.5 "
        "· cross-entropy (terms.lm, on by default here) and 0.5 · (0.5 LM + 0.5 KD) on a corpus: "
        "terms.pretrain.weight=0.5 terms.pretrain.kd_ratio=0.5 with a corpus. It computes in bfloat16; here in "
        "float32. Its DPOP penalty is outside σ; in Smaug (2402.13228) it is inside, times β. Infinite where the "
        "teacher excludes the student's choice (a logit of -inf).",
        latex=r"-\log\sigma(\beta h), \qquad h=\log\frac{q(a)}{q(b)}-\log\frac{p(a)}{p(b)}, \qquad a=\mathrm{argmax}"
        r"\,p,\; b=\mathrm{argmax}\,q",
    ),
    reads=frozenset({Signal.STUDENT_LOGITS, Signal.TEACHER_LOGITS}),
    suggests={"terms": {"main": 0.5, "lm": {"weight": 0.5}}},
    traits=frozenset({Trait.NON_NEGATIVE, Trait.STATIONARY_AT_MATCH, Trait.SHIFT_INVARIANT}),
)


@hookimpl
def dpkd_losses() -> list[LossSpec]:
    return [SPEC]
