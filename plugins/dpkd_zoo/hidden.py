"""What the losses on hidden states share: the choice of layers, and a learned map between two widths.

Shapes: N positions, K pairs of layers, S and T the widths of student and teacher.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dpkd.api import Layers, Stack, TokenInputs, TokenLoss, setting
from dpkd.functional import layer_pairs


def layers(default: str, source: str) -> Any:
    """The setting `layers`: a `Literal["last", "even"]`."""
    description = (
        "last: the last pair of layers; even: each student layer with the teacher's at the same relative depth"
    )
    return setting(default, description=description, source=source)


def pairs() -> Any:
    """The setting `pairs`, which replaces `layers`."""
    description = "pairs (student's, teacher's) instead of layers, such as [[1, 4], [2, 8]]; 0 is the embedding"
    return setting((), description=description, source="our choice")


def projection(source: str) -> Any:
    """The setting `projection`: a `Literal["learned", "none"]`."""
    description = "learned: a matrix for each pair of layers; none: models of one width only"
    return setting("learned", description=description, source=source)


def bind(loss: TokenLoss[Any], student: Stack, teacher: Stack) -> Layers:
    """The layers that the settings name; gives the loss its matrices `weight` `[K, T, S]`.

    Raises ValueError, in words for the user, when the widths differ and no projection may bridge them.
    """
    c = loss.config
    chosen = c.pairs or layer_pairs(c.layers, student.layers, teacher.layers)
    if c.projection == "learned":
        weight_KTS = torch.empty(len(chosen), teacher.width, student.width)
        for matrix_TS in weight_KTS:
            # With equal widths training starts from a copy.
            (nn.init.eye_ if student.width == teacher.width else nn.init.orthogonal_)(matrix_TS)
        loss.weight = nn.Parameter(weight_KTS)
    elif student.width != teacher.width:
        raise ValueError(
            f"projection is none, but the student's hidden states have {student.width} numbers and the teacher's "
            f"{teacher.width}; set projection to learned"
        )
    return Layers(tuple(i for i, _ in chosen), tuple(j for _, j in chosen))


def mapped(loss: TokenLoss[Any], x: TokenInputs) -> Tensor:
    """The student's states in the teacher's space `[N, K, T]`."""
    if loss.config.projection == "none":
        return x.student_hidden
    return torch.einsum("nks,kts->nkt", x.student_hidden, loss.weight)
