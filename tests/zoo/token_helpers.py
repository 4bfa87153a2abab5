"""What the tests of token losses share: rows of probabilities, values, gradients."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from zoo_inputs import token_inputs

__all__ = ["gradient", "logs", "out", "through_softmax", "value"]


def logs(*rows: list[float]) -> Tensor:
    """Log-probabilities of rows of probabilities, float64."""
    return torch.tensor(rows, dtype=torch.float64).log()


def out(tensor: Tensor, *ids: int) -> Tensor:
    """The same logits with some tokens excluded."""
    tensor = tensor.clone()
    tensor[:, list(ids)] = -math.inf
    return tensor


def value(loss: Any, student: Tensor, teacher: Tensor, targets: Any = None) -> Tensor:
    """What the loss returns, detached."""
    return loss(token_inputs(student, teacher, targets)).detach()  # type: ignore[no-any-return]


def gradient(loss: Any, student: Tensor, teacher: Tensor, targets: Any = None) -> Tensor:
    """Gradient of the summed values with respect to the student's logits."""
    leaf = student.detach().clone().requires_grad_()
    loss(token_inputs(leaf, teacher, targets)).sum().backward()
    assert leaf.grad is not None
    return leaf.grad


def through_softmax(q: Tensor, slope: Tensor) -> Tensor:
    """dL/dz from dL/dq: `q (g - Σ q g)`."""
    return q * (slope - (q * slope).sum(-1, keepdim=True))
