"""On-policy distillation (Thinking Machines, 2025): reverse KL on the student's own text, by sampled tokens.

With ℓ = log q(y) - log p(y) of a token that the student sampled, Schulman's estimators of KL(q‖p) are k1 = ℓ, k2 = ℓ²/2
and k3 = p/q - 1 + ℓ. A correct value does not imply a correct gradient. Per token, in expectation over samples of q:

    k1 as a loss             0: E[∇log q] = 0; so k1 enters here as the reward -ℓ of a policy gradient
    k1 as a reward           ∇KL(q‖p)
    k2 as a loss             ∇KL(q‖p): ℓ·∇log q, the policy gradient with discount 0 in another form
    k3 as a loss             ∇KL(p‖q), the *forward* KL: (1 - p/q)·∇log q
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import model_validator
from torch import Tensor

from dpkd.api import (
    Card,
    LossConfig,
    LossSpec,
    Rollout,
    RolloutInputs,
    RolloutLoss,
    Signal,
    Text,
    Trait,
    hookimpl,
    setting,
)
from dpkd.functional import returns_to_go
from dpkd_zoo.papers import KL_APPROXIMATION, KL_PITFALLS, ON_POLICY, at

FAR = 20.0  # e^20 is far above any useful ratio: the bound only prevents an overflow


class OPDConfig(LossConfig):
    """Which estimator, what a reward looks ahead to, and importance weights."""

    estimator: Literal["k1", "k2", "k3"] = setting(
        "k1",
        description="k1: reward of a policy gradient; k2, k3: a loss of the drawn token (k3: of the forward KL)",
        source="tinker-cookbook, train_on_policy.py: advantage log p - log q_old",
    )
    discount: float = setting(
        0.0,
        description="γ: a token's return is its own reward plus γ times the return of the next (k1)",
        source="tinker-cookbook: 0.0",
        ge=0,
        le=1,
    )
    reward_clip: float | None = setting(
        None, description="largest absolute reward (k1); none: off", source="tinker-cookbook: none", gt=0
    )
    importance: bool = setting(
        True,
        description="weight a token by q/q_drawn: its probability now over that when it was sampled",
        source="tinker-cookbook: loss_fn importance_sampling",
    )
    clip_epsilon: float | None = setting(
        None,
        description="ε of the PPO clipping of that ratio (k1); none: off",
        source="tinker-cookbook: none (PPO: 0.2)",
        gt=0,
        lt=1,
    )

    @model_validator(mode="after")
    def _of_use(self) -> OPDConfig:
        if self.estimator != "k1" and (self.discount > 0 or self.reward_clip is not None or self.clip_epsilon):
            raise ValueError(
                f"discount, reward_clip and clip_epsilon apply to the policy gradient (estimator=k1), not to "
                f"estimator={self.estimator}: leave them at 0.0, none and none"
            )
        if self.clip_epsilon is not None and not self.importance:
            raise ValueError("clip_epsilon clips the importance ratio, which importance=false leaves out")
        return self


def _k3(gap_N: Tensor) -> Tensor:
    """`exp(-ℓ) - 1 + ℓ`, linear where the exponential would overflow."""
    return torch.expm1((-gap_N).clamp(max=FAR)) + torch.relu(-gap_N - FAR) * math.exp(FAR) + gap_N


class OPDLoss(RolloutLoss[OPDConfig]):
    """k1: `-A · q/q_drawn`, `A = Σ γᵏ (log p - log q_old)`; k2, k3: `q/q_drawn` (held fixed) times the estimator."""

    def advantages(self, rollout: Rollout) -> Tensor:
        rewards_N = (rollout.teacher_logps - rollout.rollout_logps).detach()
        if self.config.reward_clip is not None:
            rewards_N = rewards_N.clamp(-self.config.reward_clip, self.config.reward_clip)
        if self.config.discount == 0:
            return rewards_N  # not returns_to_go: 0 times an infinite reward is NaN
        return returns_to_go(rewards_N, rollout.sequence, self.config.discount)

    def forward(self, x: RolloutInputs) -> Tensor:
        log_q_N = x.student_logps()
        if self.config.estimator == "k1":
            return self._policy_gradient(x, log_q_N)
        gap_N = x.part("log_ratio", log_q_N - x.teacher_logps)
        value_N = gap_N.square() / 2 if self.config.estimator == "k2" else _k3(gap_N)
        return value_N * _ratio(x, log_q_N.detach()) if self.config.importance else value_N

    def _policy_gradient(self, x: RolloutInputs, log_q_N: Tensor) -> Tensor:
        advantage_N = x.part("advantage", x.advantages)
        if not self.config.importance:
            return -advantage_N * log_q_N
        ratio_N = _ratio(x, log_q_N)
        loss_N, epsilon = -advantage_N * ratio_N, self.config.clip_epsilon
        if epsilon is None:
            return loss_N
        return torch.maximum(loss_N, -advantage_N * ratio_N.clamp(1 - epsilon, 1 + epsilon))


def _ratio(x: RolloutInputs, log_q_N: Tensor) -> Tensor:
    return (log_q_N - x.behaviour_logps).clamp(max=FAR).exp()


def _reads(config: OPDConfig) -> frozenset[Signal]:
    reads = {Signal.STUDENT_LOGITS, Signal.TARGETS, Signal.TEACHER_LOGPS}
    if config.estimator == "k1":
        reads |= {Signal.ADVANTAGES, Signal.ROLLOUT_LOGPS}
    if config.importance:
        reads |= {Signal.BEHAVIOUR_LOGPS}
    return frozenset(reads)


SPEC = LossSpec(
    name="opd",
    loss=OPDLoss,
    config=OPDConfig,
    card=Card(
        title="On-policy distillation",
        summary="Policy gradient on the student's own text: the reward of a token is log p - log q under the teacher.",
        formula="-Aₜ·q(yₜ)/q_drawn(yₜ),  Aₜ = Σₖ γᵏ·(log p(yₜ₊ₖ) - log q_old(yₜ₊ₖ));  k2: ℓ²/2,  k3: p/q - 1 + ℓ,  ℓ "
        "= log q - log p",
        sources=(
            at(ON_POLICY, "loss and tinker-cookbook's train_on_policy.py"),
            at(KL_APPROXIMATION, "k1, k2, k3 as estimators of the value"),
            at(KL_PITFALLS, "what their gradients are"),
        ),
        use_when="The teacher can only give log-probs of given tokens (a server), and the student already writes well "
        "enough to learn from its own text.",
        avoid_when="The teacher's logits are available: rkl on student text (text.source=student) has the gradient of "
        "discount 0 exactly, where this samples it. Avoid estimator=k3 for the reverse KL: its gradient is the "
        "forward KL's.",
        notes="Which gradient, in expectation over fresh text. k1, discount 0 (default): the reverse KL at every "
        "prefix that the student writes, ignoring what a token does to later ones. k1, discount 1: the reverse KL of "
        "whole responses, exactly, with more variance. k2: as k1 with discount 0, but with the current log-ratio, not "
        "the one at sampling time. k3: the forward KL(p‖q) at the student's prefixes, despite its reputation as an "
        "estimator of the reverse KL's value; GRPO's KL term is of this kind. k1 as a plain loss has gradient 0 and "
        "is not offered. With importance=true the same holds, at the prefixes actually sampled, for text of another "
        "policy (teacher_mix; later passes, where k1 keeps the reward from sampling time). tinker-cookbook multiplies "
        "rewards by kl_penalty_coef = 1 (here terms.main) and sums over tokens where dpkd takes the mean; its "
        "learning rate is 1e-4 with LoRA, 5e-5 without. Unlike minillm: no single-step part, no length normalization, "
        "no clipping. A token that the teacher excludes has reward -∞: set reward_clip where its log-probs are "
        "truncated. Costs one log-prob per token of the teacher instead of a distribution; the student's sampling "
        "dominates the time of a step, many times kd's.",
        latex=r"-A_t\,\frac{q(y_t)}{q_\mathrm{drawn}(y_t)}, \qquad A_t=\sum_k\gamma^k\big(\log p(y_{t+k})-\log "
        r"q_\mathrm{old}(y_{t+k})\big)",
    ),
    reads=_reads,
    accepts=frozenset({Text.STUDENT}),
    suggests={
        "text": {"source": "student", "refresh": "every_step"},
        "student": {"dropout": "off"},
        "train": {"lr": 5e-5},
    },
    traits=frozenset({Trait.SCORE_FUNCTION, Trait.SHIFT_INVARIANT}),
)


@hookimpl
def dpkd_losses() -> list[LossSpec]:
    return [SPEC]
