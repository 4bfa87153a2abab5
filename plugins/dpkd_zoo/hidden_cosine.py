"""Direction of hidden states (DistilBERT, 1910.01108, §3: L_cos), with a learned projection where widths differ.

The length of a state counts for nothing, so that the few large dimensions of big models do less harm than in a squared
distance. Shapes: N positions, K pairs of layers, S and T the widths of student and teacher.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from dpkd.api import HIDDEN, Card, Layers, LossConfig, LossSpec, Stack, TokenInputs, TokenLoss, Trait, hookimpl, setting
from dpkd.functional import layer_pairs
from dpkd_zoo.papers import DISTILBERT, at


class HiddenCosineConfig(LossConfig):
    """Which layers, and whether a projection lies between them."""

    layers: Literal["last", "even"] = setting(
        "last",
        description="pairs of layers: the last ones; or the student's, each with the teacher's at the same "
        "share of the depth",
        source="DistilBERT: the last hidden states",
    )
    pairs: tuple[tuple[int, int], ...] = setting(
        (),
        description="pairs (student's, teacher's) in place of layers, such as [[1, 4], [2, 8]]; 0 is the embedding",
        source="our choice",
    )
    projection: Literal["learned", "none"] = setting(
        "learned",
        description="a matrix for each pair, or none, which takes models of one width",
        source="our choice; DistilBERT has one width and none",
    )


class HiddenCosineLoss(TokenLoss[HiddenCosineConfig]):
    """`Σ_k 1 - cos(W_k s_k, t_k)`."""

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
        return (1 - torch.cosine_similarity(mapped_NKT, x.teacher_hidden, dim=-1)).sum(-1)


SPEC = LossSpec(
    name="hidden-cosine",
    loss=HiddenCosineLoss,
    config=HiddenCosineConfig,
    card=Card(
        title="Angle between hidden states",
        summary="The direction of hidden states of chosen layers, through a learned projection.",
        formula="Σₖ 1 - cos(Wₖ·sₖ, tₖ),  sₖ, tₖ = hidden states of the k-th pair of layers",
        sources=(at(DISTILBERT, "§3, L_cos (section from memory)"),),
        use_when="hidden-mse is ruled by a few large dimensions; or the last state alone shall be copied, beside kd "
        "(terms.extra).",
        avoid_when="It would stand alone: nothing here trains the output head, and a state of the right direction but "
        "the wrong length gives other logits.",
        notes="Between 0 and 2 for each pair of layers. DistilBERT adds it to a distillation and a language-model "
        "loss, each with a weight of its own, on models of one width without a projection (projection=none). W starts "
        "as the identity where the widths are equal, else with orthonormal rows or columns; it is in the checkpoints, "
        "not in the finished model. Needs the teacher's model, no store. Cost: one product with W for each position "
        "and pair of layers, and no vocabulary; the states of the layers that it reads are held for a micro-batch.",
    ),
    reads=HIDDEN,
    traits=frozenset({Trait.NON_NEGATIVE}),
)


@hookimpl
def dpkd_losses() -> list[LossSpec]:
    """This module's loss."""
    return [SPEC]
