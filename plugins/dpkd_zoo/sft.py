"""Supervised fine-tuning: cross-entropy on the response tokens.

The baseline of every table, and the start of every student (MiniLLM and DPKD begin from an SFT checkpoint).
"""

from __future__ import annotations

from torch import Tensor

from dpkd.api import Card, LossConfig, LossSpec, Signal, Text, TokenInputs, TokenLoss, Trait, hookimpl
from dpkd.functional import KLSum, nll
from dpkd_zoo.papers import LMOPS, at


class SFTConfig(LossConfig):
    """No settings."""


class SFTLoss(TokenLoss[SFTConfig]):
    """`-log q(y_i | y_<i, x)`."""

    def forward(self, x: TokenInputs) -> Tensor:
        return nll(x.student_log_probs(), x.targets)

    def kl_sum(self) -> KLSum:
        return KLSum(likelihood=1.0)


SPEC = LossSpec(
    name="sft",
    loss=SFTLoss,
    config=SFTConfig,
    card=Card(
        title="Supervised fine-tuning",
        summary="Cross-entropy on the response; no teacher.",
        formula="-log q(yᵢ | y₍<ᵢ₎, x)",
        sources=(at(LMOPS, "finetune.py; scripts/gpt2/sft"),),
        use_when="You have good responses and no teacher, or need a starting point for a student or teacher.",
        avoid_when="A teacher is available: its distributions say more per token than one label does.",
        notes="EOS is part of the response and is trained. Released defaults for GPT-2 base: lr 5e-4, 20 epochs, "
        "batch 32, cosine to 1e-7. On teacher text (text.source=teacher) this is sequence-level KD.",
        latex=r"-\log q(y_i\mid y_{<i},x)",
    ),
    reads=frozenset({Signal.STUDENT_LOGITS, Signal.TARGETS}),
    accepts=frozenset({Text.DATASET, Text.TEACHER}),
    traits=frozenset({Trait.NON_NEGATIVE, Trait.SHIFT_INVARIANT}),
)


@hookimpl
def dpkd_losses() -> list[LossSpec]:
    return [SPEC]
