"""Direction of hidden states (DistilBERT, 1910.01108, §2: L_cos), with a learned projection.

The length of a state does not matter, so the few large dimensions of big models do less harm than in a squared
distance.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from dpkd.api import HIDDEN, Card, Layers, LossConfig, LossSpec, Stack, TokenInputs, TokenLoss, Trait, hookimpl
from dpkd_zoo import hidden
from dpkd_zoo.papers import DISTILBERT, at


class HiddenCosineConfig(LossConfig):
    """Which layers, and whether a projection maps one width to the other."""

    layers: Literal["even", "last"] = hidden.layers("last", "DistilBERT: the last hidden states")
    pairs: tuple[tuple[int, int], ...] = hidden.pairs()
    projection: Literal["learned", "none"] = hidden.projection("our choice; DistilBERT has one width and none")


class HiddenCosineLoss(TokenLoss[HiddenCosineConfig]):
    """`Σ_k 1 - cos(W_k s_k, t_k)`."""

    def bind(self, student: Stack, teacher: Stack) -> Layers:
        return hidden.bind(self, student, teacher)

    def forward(self, x: TokenInputs) -> Tensor:
        return (1 - torch.cosine_similarity(hidden.mapped(self, x), x.teacher_hidden, dim=-1)).sum(-1)


SPEC = LossSpec(
    name="hidden-cosine",
    loss=HiddenCosineLoss,
    config=HiddenCosineConfig,
    card=Card(
        title="Angle between hidden states",
        summary="The direction of hidden states of chosen layers, through a learned projection.",
        formula="Σₖ 1 - cos(Wₖ·sₖ, tₖ),  sₖ, tₖ = hidden states of the k-th pair of layers",
        sources=(at(DISTILBERT, "§2, L_cos"),),
        use_when="A few large dimensions dominate hidden-mse; or only the last state should be copied, beside kd "
        "(terms.extra).",
        avoid_when="On its own: nothing here trains the output head, and a state with the right direction but the "
        "wrong length gives other logits.",
        notes="Between 0 and 2 for each pair of layers. DistilBERT adds it to a distillation and a language-model "
        "loss, each with its own weight, on models of one width without a projection (projection=none). W starts as "
        "the identity where the widths are equal, otherwise with orthonormal rows or columns; it is in the "
        "checkpoints, not in the finished model. Needs the teacher's model, not a store. Cost: one product with W for "
        "each position and pair of layers, and no vocabulary; the states of the layers that it reads are kept for a "
        "micro-batch.",
        latex=r"\sum_k 1-\cos(W_k s_k,\,t_k)",
    ),
    reads=HIDDEN,
    traits=frozenset({Trait.NON_NEGATIVE}),
)


@hookimpl
def dpkd_losses() -> list[LossSpec]:
    return [SPEC]
