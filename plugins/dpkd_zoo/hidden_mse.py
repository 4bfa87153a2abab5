"""Hidden states of the teacher, copied by the student through a learned projection (TinyBERT, 1909.10351).

FitNets' hint training (1412.6550) in a transformer: each chosen state of the student is mapped into the teacher's space
by its own matrix, which is trained with the student and discarded afterwards.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from dpkd.api import HIDDEN, Card, Layers, LossConfig, LossSpec, Stack, TokenInputs, TokenLoss, Trait, hookimpl
from dpkd_zoo import hidden
from dpkd_zoo.papers import FITNETS, TINYBERT, at


class HiddenMSEConfig(LossConfig):
    """Which layers, and whether a projection maps one width to the other."""

    layers: Literal["even", "last"] = hidden.layers("even", "TinyBERT's released code: every (M/N)-th layer")
    pairs: tuple[tuple[int, int], ...] = hidden.pairs()
    projection: Literal["learned", "none"] = hidden.projection("TinyBERT's released code: fit_dense")


class HiddenMSELoss(TokenLoss[HiddenMSEConfig]):
    """`Σ_k 1/T ‖W_k s_k - t_k‖²`."""

    def bind(self, student: Stack, teacher: Stack) -> Layers:
        return hidden.bind(self, student, teacher)

    def forward(self, x: TokenInputs) -> Tensor:
        return (hidden.mapped(self, x) - x.teacher_hidden).square().mean(-1).sum(-1)


SPEC = LossSpec(
    name="hidden-mse",
    loss=HiddenMSELoss,
    config=HiddenMSEConfig,
    card=Card(
        title="Squared distance of hidden states",
        summary="Hidden states of chosen layers, through a learned projection, against the teacher's.",
        formula="Σₖ 1/T·‖Wₖ·sₖ - tₖ‖²,  sₖ, tₖ = hidden states of the k-th pair of layers, T = the teacher's width",
        sources=(
            at(
                TINYBERT,
                "released code huawei-noah/Pretrained-Language-Model, TinyBERT/general_distill.py: rep_loss and the "
                "mapping of layers; transformer/modeling.py: fit_dense is W",
            ),
            at(FITNETS, "hint training; as in megvii-research/mdistiller, mdistiller/distillers/FitNet.py"),
        ),
        use_when="The student consists of some of the teacher's layers, and logits alone converge slowly: beside kd "
        "(terms.extra), often only in the first part of training.",
        avoid_when="On its own: nothing here trains the output head. Or student and teacher are unrelated, so their "
        "layers do not correspond.",
        notes="The value is in squared activations, not in nats, and the states of large models have a few dimensions "
        "that outweigh all others: look at loss/main before choosing a weight, or use hidden-cosine. The sum over "
        "pairs is TinyBERT's, with its weights λ all 1. Its code shares one matrix among all layers, and also copies "
        "embeddings ([0, 0] in pairs) and attention maps, which are not included here. W starts as the identity where "
        "the widths are equal, otherwise with orthonormal rows or columns; it is in the checkpoints, not in the "
        "finished model. Needs the teacher's model, not a store. Cost: one product with W for each position and pair "
        "of layers, and no vocabulary; the states of the layers that it reads are kept for a micro-batch.",
        latex=r"\sum_k\frac1T\,\big\|W_k s_k-t_k\big\|^2",
    ),
    reads=HIDDEN,
    traits=frozenset({Trait.NON_NEGATIVE}),
)


@hookimpl
def dpkd_losses() -> list[LossSpec]:
    return [SPEC]
