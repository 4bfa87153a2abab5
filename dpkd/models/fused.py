"""Losses of a chunk that need no `[n, V]` tensor but the logits themselves: Triton kernels; on a CPU, blocks of rows.

Shapes: N rows, n of one chunk, V vocabulary.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from dpkd import functional
from dpkd.functional import KLSum, log_softmax
from dpkd.models.head import Head, LogitRule


@cache
def why_not(kind: str) -> str | None:
    """Why the kernels do not serve on a kind of device, or None: looked for, and tried against the formula.

    They are tried as losses are computed, without autocast, though a step asks for the first time inside it.
    """
    if kind not in ("cuda", "cpu"):
        return "there is no GPU"
    if _by_triton(kind) and find_spec("triton") is None:
        return "Triton is not installed"
    try:
        with torch.autocast(kind, enabled=False):
            gap = _gap(torch.device(kind))
    except Exception as error:  # of a compiler, a driver: a run does not end because an optimization does not work
        return f"they fail here ({type(error).__name__}: {str(error).strip().splitlines()[-1][:200]})"
    return None if gap < 1e-4 else f"they differ from the formula by {gap:.2g} here"


def _by_triton(kind: str) -> bool:
    """On a CPU Triton's interpreter is for tests."""
    return kind == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"


def _kernel(kind: str) -> Callable[..., Tensor]:
    """The `kl_sum_` of a kind of device."""
    if _by_triton(kind):
        from dpkd.models import kernels

        return kernels.kl_sum_
    from dpkd.models import cpu_kernels

    return cpu_kernels.kl_sum_


def _gap(device: torch.device) -> float:
    """The largest difference of a kernel's values from the formula, on a few rows."""
    kl_sum_ = _kernel(device.type)
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 100, generator=generator).to(device) for _ in range(2))
    ids = torch.tensor([3, 4], device=device)
    terms = KLSum(0.3, 0.7, 0.5, forward_share=0.3, reverse_share=0.3)
    expected = torch.stack(
        [t for t in terms.terms(log_softmax(teacher), log_softmax(student), ids) if t is not None], 1
    )
    return float((kl_sum_(student, teacher, ids, terms, 1.0) - expected).abs().max())


def usable(head: Head) -> bool:
    """Whether the kernels serve where the head is, and know what the model does to its logits."""
    device, wide = head.weight.device, head.weight.dtype == torch.float64
    looks = not _by_triton(device.type)  # at its values
    if wide or head.rule.softcap is not None or (looks and not functional.free_to_read(device)):
        return False
    return why_not(device.type) is None


def kl_sum_of(loss: Any) -> KLSum | None:
    """What a loss says that it is, if it says so: a sum of KL divergences and a likelihood."""
    tell: Callable[[], KLSum | None] | None = getattr(loss, "kl_sum", None)
    return None if tell is None else tell()


@dataclass(frozen=True)
class FusedKL:
    """A `KLSum` over packed rows, as `dpkd.models.chunked.objective` takes it.

    weight   of each row's value in the total
    rule     what the student does to its logits: a scale, no cap
    targets  [N]
    teacher  gives logits [n, V] of some rows up to a factor, and that factor; None where only the likelihood is read
    observe  receives the value of each row of a chunk, and the parts that the loss names
    look     is shown the raw logits of a chunk before they are overwritten; None: nobody measures
    """

    terms: KLSum
    weight: float
    rule: LogitRule
    targets: Tensor
    teacher: Callable[[slice], tuple[Tensor, float]] | None
    observe: Callable[[Tensor, dict[str, Tensor]], None]
    look: Callable[[Tensor, slice], None] | None = None

    def __call__(self, raw_nV: Tensor, rows: slice) -> Tensor:
        """The weighted sum of some rows; their raw logits become the gradient by them."""
        kl_sum_ = _kernel(raw_nV.device.type)
        if self.look is not None:
            self.look(raw_nV, rows)
        terms = self.terms
        teacher_nV, scale = (None, 1.0) if self.teacher is None else self.teacher(rows)
        columns = kl_sum_(
            raw_nV,
            teacher_nV,
            self.targets[rows],
            terms,
            self.weight,
            student_scale=self.rule.scale,
            teacher_scale=scale,
        ).unbind(1)
        factors = (terms.forward, terms.reverse, terms.likelihood)
        values_n = torch.stack([f * column for f, column in zip(factors, columns, strict=True) if f]).sum(0)
        named = zip(terms.parts, factors, columns, strict=True)
        self.observe(values_n, {part: column for part, factor, column in named if part and factor})
        return values_n.sum() * self.weight
