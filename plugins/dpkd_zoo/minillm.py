"""MiniLLM (Gu et al., 2306.08543): policy gradient of the reverse KL of whole responses, on the student's own text.

Per sampled token the gradient is (Eq. 7): a single-step part, the reverse KL over the vocabulary, and a long part, the
return of the tokens that follow, with importance weights w_t ≈ q/p̃ (Eq. 5) because the text is sampled from
p̃ = α p + (1-α) q (Eq. 4). Returns are divided by the number of tokens that they sum (Eq. 6). PPO clips q/p̃.
"""

from __future__ import annotations

import warnings
from typing import Any, Literal

import torch
from pydantic import field_validator
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
from dpkd.functional import kl, returns_to_go, segment_sum
from dpkd_zoo.papers import LMOPS, MINILLM, at


class MiniLLMConfig(LossConfig):
    """The paper's form; `card.notes` lists the values of the released code."""

    discount: float = setting(1.0, description="γ of the return", source="Eq. 2 (released: 0.95)", gt=0, le=1)
    include_current: bool = setting(
        False, description="a return includes the token's own reward", source="Eq. 3: R_{t+1} (released: true)"
    )
    length_normalise: bool = setting(
        True, description="divide a return by its number of rewards", source="Eq. 6; without: Rouge-L 24.6 to 14.7"
    )
    reward_scale: float = setting(
        1.0, description="rewards log p/q are divided by it", source="Eq. 2 (released: 0.5)", gt=0
    )
    reward_clip: float | None = setting(
        None, description="largest absolute reward", source="not in the paper (released: 100)", gt=0
    )
    whiten: Literal["none", "rows", "released"] = setting(
        "none",
        description="returns to mean 0 and variance 1: over the sampled tokens (rows), or as in the released code "
        "(zeros of padding count, unbiased variance)",
        source="not in the paper (released code: released)",
    )
    clip_epsilon: float | None = setting(
        0.2, description="ε of the PPO clipping of q/p̃; none: off", source="Algorithm 1; --cliprange", gt=0, lt=1
    )
    single_step_weight: float = setting(1.0, description="weight of the single-step part", source="Eq. 3", ge=0)
    weigh_single_step: bool = setting(
        True, description="multiply the single-step part by w_t too", source="Eq. 7 (released: false)"
    )

    @field_validator("whiten", mode="before")
    @classmethod
    def _once_a_switch(cls, value: Any) -> Any:
        if not isinstance(value, bool):
            return value
        now = "rows" if value else "none"
        warnings.warn(f"loss.whiten={str(value).lower()} is now loss.whiten={now}", FutureWarning, stacklevel=2)
        return now


def _from_next(values_N: Tensor, sequence_N: Tensor) -> Tensor:
    """The value at the next token of the same response; 0 at its last token."""
    next_N = torch.zeros_like(values_N)
    next_N[:-1] = torch.where(sequence_N[1:] == sequence_N[:-1], values_N[1:], 0.0)
    return next_N


def _whitened(values_N: Tensor) -> Tensor:
    """Values of mean 0 and variance 1; the small number keeps constant values at 0."""
    centered_N = values_N - values_N.mean()
    return centered_N * (centered_N.square().mean() + 1e-8).rsqrt()


def _whitened_as_released(values_N: Tensor, sequence_N: Tensor) -> Tensor:
    """As released (losses.py, utils.whiten): statistics over responses padded with zeros to the longest."""
    lengths_B = segment_sum(torch.ones_like(values_N), sequence_N, int(sequence_N.max()) + 1)
    count = len(lengths_B) * lengths_B.max()
    mean = values_N.sum() / count
    padding = count - len(values_N)
    variance = ((values_N - mean).square().sum() + padding * mean.square()) / (count - 1).clamp(min=1)
    return (values_N - mean) * (variance + 1e-8).rsqrt()


class MiniLLMLoss(RolloutLoss[MiniLLMConfig]):
    """`w · KL(q‖p) - R · q/p̃` per sampled token; the value is a surrogate, its gradient is Eq. 7."""

    def advantages(self, rollout: Rollout) -> Tensor:
        c = self.config
        rewards_N = (rollout.teacher_logps - rollout.rollout_logps) / c.reward_scale
        if c.reward_clip is not None:
            rewards_N = rewards_N.clamp(-c.reward_clip, c.reward_clip)
        returns_N = returns_to_go(rewards_N, rollout.sequence, c.discount)
        counts_N = returns_to_go(torch.ones_like(rewards_N), rollout.sequence)
        if not c.include_current:
            returns_N, counts_N = (_from_next(v, rollout.sequence) for v in (returns_N, counts_N))
        if c.length_normalise:
            returns_N = returns_N / counts_N.clamp(min=1)
        if c.whiten == "none" or not len(returns_N):
            return returns_N
        return _whitened(returns_N) if c.whiten == "rows" else _whitened_as_released(returns_N, rollout.sequence)

    def forward(self, x: RolloutInputs) -> Tensor:
        c = self.config
        # e^20 is far above any clipping: the bound only prevents an overflow.
        ratio_N = (x.student_logps() - x.behaviour_logps).clamp(max=20.0).exp()  # q/p̃, q of now
        loss_N = -x.advantages * ratio_N
        if c.clip_epsilon is not None:
            clipped_N = ratio_N.clamp(1 - c.clip_epsilon, 1 + c.clip_epsilon)
            loss_N = torch.maximum(loss_N, -x.advantages * clipped_N)
        if c.single_step_weight == 0:
            return loss_N
        x.part("long", loss_N)
        single_N = kl(x.student_log_probs(), x.teacher_log_probs())
        if c.weigh_single_step:
            single_N = single_N * (x.rollout_logps - x.behaviour_logps).exp()
        return loss_N + c.single_step_weight * x.part("single_step", single_N)


def _reads(config: MiniLLMConfig) -> frozenset[Signal]:
    teacher = Signal.TEACHER_LOGITS if config.single_step_weight > 0 else Signal.TEACHER_LOGPS
    drawn = {Signal.TARGETS, Signal.ROLLOUT_LOGPS, Signal.BEHAVIOUR_LOGPS, Signal.ADVANTAGES}
    return frozenset({Signal.STUDENT_LOGITS, teacher, *drawn})


SUGGESTS = {
    "text": {"source": "student", "teacher_mix": 0.2, "refresh": "every_n_steps", "every": 4, "num_iterations": 4},
    "student": {"dropout": "off"},
    "train": {"lr": 5e-6, "schedule": "constant", "warmup_steps": 100, "betas": [0.9, 0.95], "weight_decay": 1e-6},
}

SPEC = LossSpec(
    name="minillm",
    loss=MiniLLMLoss,
    config=MiniLLMConfig,
    card=Card(
        title="MiniLLM",
        summary="Policy gradient of the sequence-level reverse KL, on text sampled from teacher and student mixed.",
        formula="∇ = -E_{y~p̃} Σₜ wₜ·[∇ Σᵥ q(v)·log(p(v)/q(v)) + Rₜ₊₁·∇ log q(yₜ)],  wₜ = q/p̃,  p̃ = αp + (1-α)q",
        sources=(at(MINILLM, "Eq. 2-7, Algorithm 1"), at(LMOPS, "losses.py, sampler.py")),
        use_when="On-policy training is affordable, and whole responses should be likely under the teacher.",
        avoid_when="Sampling is the bottleneck, or the student cannot write a sensible sentence yet: start from SFT.",
        notes="Released code: discount=0.95 include_current=true reward_scale=0.5 reward_clip=100 whiten=released "
        "weigh_single_step=false; it divides returns by length whatever --length-norm says. Its whitening works on a "
        "rectangle of responses, padded with zeros to the longest, with the unbiased variance: whiten=released. It "
        "does so for each mini-batch; here a whole collection is whitened at once. Eq. 6 prints 1/(T-t-1) for a sum "
        "of T-t rewards; here it is their number. Rewards and w are taken from the student that sampled the text. "
        "Paper and code add a pre-training term of weight 1 (terms.pretrain; released: kd_ratio 0.5), which needs a "
        "corpus and so is off here. Paper: mini-batch 64, 256 responses per collection, 5,000 steps from an SFT "
        "student chosen by validation loss; warm-up as released.",
        latex=r"\nabla=-\mathbb{E}_{y\sim\tilde p}\sum_t w_t\Big[\nabla\sum_v q(v)\log\frac{p(v)}{q(v)}+R_{t+1}"
        r"\nabla\log q(y_t)\Big], \qquad w_t=\frac{q}{\tilde p},\quad \tilde p=\alpha p+(1-\alpha)q",
    ),
    reads=_reads,
    accepts=frozenset({Text.STUDENT}),
    suggests=SUGGESTS,
    traits=frozenset({Trait.SCORE_FUNCTION, Trait.SHIFT_INVARIANT}),
)


@hookimpl
def dpkd_losses() -> list[LossSpec]:
    return [SPEC]
