"""Hidden states of the teacher, copied by the student through a learned projection (TinyBERT, 1909.10351, Eq. 8).

FitNets' hint (1412.6550, Eq. 3) in a transformer: each chosen state of the student is mapped into the teacher's space
by a matrix of its own, which is trained with it and thrown away after. Shapes: N positions, K pairs of layers, S and
T the widths of student and teacher.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from dpkd.api import HIDDEN, Card, Layers, LossConfig, LossSpec, Stack, TokenInputs, TokenLoss, Trait, hookimpl, setting
from dpkd.functional import layer_pairs
from dpkd_zoo.papers import FITNETS, TINYBERT, at


class HiddenMSEConfig(LossConfig):
    """Which layers, and whether a projection lies between them."""

    layers: Literal["even", "last"] = setting(
        "even",
        description="pairs of layers: the student's, each with the teacher's at the same share of the depth; "
        "or the last ones",
        source="TinyBERT §4.2: the uniform mapping",
    )
    pairs: tuple[tuple[int, int], ...] = setting(
        (),
        description="pairs (student's, teacher's) in place of layers, such as [[1, 4], [2, 8]]; 0 is the embedding",
        source="our choice",
    )
    projection: Literal["learned", "none"] = setting(
        "learned",
        description="a matrix for each pair, or none, which takes models of one width",
        source="TinyBERT Eq. 8",
    )


class HiddenMSELoss(TokenLoss[HiddenMSEConfig]):
    """`Σ_k 1/T ‖W_k s_k - t_k‖²`."""

    def bind(self, student: Stack, teacher: Stack) -> Layers:
        c = self.config
        pairs = c.pairs or layer_pairs(c.layers, student.layers, teacher.layers)
        if c.projection == "learned":
            weight_KTS = torch.empty(len(pairs), teacher.width, student.width)
            for matrix_TS in weight_KTS:
                # Where a copy is possible it is the beginning.
                (nn.init.eye_ if student.width == teacher.width else nn.init.orthogonal_)(matrix_TS)
            self.weight = nn.Parameter(weight_KTS)
        elif student.width != teacher.width:
            raise ValueError(
                f"projection is none, but the student's hidden states have {student.width} numbers and the teacher's "
                f"{teacher.width}; set projection to learned"
            )
        return Layers(tuple(i for i, _ in pairs), tuple(j for _, j in pairs))

    def forward(self, x: TokenInputs) -> Tensor:
        mapped_NKT = x.student_hidden
        if self.config.projection == "learned":
            mapped_NKT = torch.einsum("nks,kts->nkt", mapped_NKT, self.weight)
        return (mapped_NKT - x.teacher_hidden).square().mean(-1).sum(-1)


SPEC = LossSpec(
    name="hidden-mse",
    loss=HiddenMSELoss,
    config=HiddenMSEConfig,
    card=Card(
        title="Squared distance of hidden states",
        summary="Hidden states of chosen layers, through a learned projection, against the teacher's.",
        formula="Σₖ 1/T·‖Wₖ·sₖ - tₖ‖²,  sₖ, tₖ = hidden states of the k-th pair of layers, T = the teacher's width",
        sources=(
            at(TINYBERT, "§4.1, Eq. 8; §4.2, the mapping (numbers from memory)"),
            at(FITNETS, "§2.2, Eq. 3 (number from memory)"),
        ),
        use_when="The student is made of some of the teacher's layers, and logits alone find the way slowly: beside kd "
        "(terms.extra), often only in the first part of training.",
        avoid_when="It would stand alone: nothing here trains the output head. Or student and teacher are strangers, "
        "whose layers do not correspond.",
        notes="The value is in squared activations, not in nats, and the states of large models have a few "
        "dimensions that outweigh all others: look at loss/main before choosing a weight, or take hidden-cosine. The "
        "sum over pairs is TinyBERT's, its weights λ all 1. Its code shares one matrix among all layers, and also "
        "copies embeddings ([0, 0] in pairs) and attention maps, which are not here. W starts as the identity where "
        "the widths are equal, else with orthonormal rows or columns; it is in the checkpoints, not in the finished "
        "model. Needs the teacher's model, no store. Cost: one product with W for each position and pair of layers, "
        "and no vocabulary; the states of the layers that it reads are held for a micro-batch.",
    ),
    reads=HIDDEN,
    traits=frozenset({Trait.NON_NEGATIVE}),
)


@hookimpl
def dpkd_losses() -> list[LossSpec]:
    """This module's loss."""
    return [SPEC]
