"""Losses of a chunk that need no `[n, V]` tensor but the logits themselves: Triton kernels, where they can be had.

Shapes: N rows, n of one chunk, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from dpkd.functional import KLSum
from dpkd.models.head import Head


def usable(device: torch.device) -> bool:
    """Whether there is a GPU, and Triton to write kernels for it."""
    return device.type == "cuda" and find_spec("triton") is not None


def kl_sum_of(loss: Any) -> KLSum | None:
    """What a loss says that it is, if it says so: a sum of KL divergences and a likelihood."""
    tell: Callable[[], KLSum | None] | None = getattr(loss, "kl_sum", None)
    return None if tell is None else tell()


@dataclass(frozen=True)
class FusedKL:
    """A `KLSum` over packed rows, as `dpkd.models.chunked.objective` takes it.

    weight   of each row's value in the total
    student, teacher  their heads; the student's logit rule may scale, and so may the teacher's
    hidden   [N, H] of the teacher; None where only the likelihood is read
    targets  [N]
    observe  receives the value of each row, and the parts that the loss names, as the chunks are done
    """

    terms: KLSum
    weight: float
    student: Head
    targets: Tensor
    hidden: Tensor | None = None
    teacher: Head | None = None
    observe: Callable[[Tensor, dict[str, Tensor]], None] | None = None

    @property
    def fits(self) -> bool:
        """Whether the kernel knows what the models do to their logits."""
        heads = (self.student, self.teacher)
        return all(head is None or head.rule.softcap is None for head in heads)

    def __call__(self, raw_nV: Tensor, rows: slice) -> Tensor:
        """The weighted sum of some rows; their raw logits become the gradient by them."""
        from dpkd.models.kernels import kl_sum_

        teacher_nV = None
        if self.teacher is not None and self.hidden is not None:
            teacher_nV = self.teacher.raw(self.hidden[rows].to(self.teacher.weight.dtype))
        terms = self.terms
        values_n3 = kl_sum_(
            raw_nV,
            teacher_nV,
            self.targets[rows],
            terms,
            self.weight,
            student_scale=self.student.rule.scale,
            teacher_scale=1.0 if self.teacher is None else self.teacher.rule.scale,
        )
        factors = (terms.forward, terms.reverse, terms.likelihood)
        values_n = sum(factor * column for factor, column in zip(factors, values_n3.unbind(1), strict=True) if factor)
        assert isinstance(values_n, Tensor)  # a sum without any term is none
        if self.observe is not None:
            named = zip(terms.parts, factors, values_n3.unbind(1), strict=True)
            self.observe(values_n, {part: column for part, factor, column in named if part and factor})
        return values_n.sum() * self.weight
