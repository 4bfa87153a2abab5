"""Metrics as sums and counts, so that micro-batches and processes add up to exactly what one batch would give."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class _Pair(NamedTuple):
    total: Tensor | float
    number: Tensor | float


class MeanMetrics:
    """Named sums and counts. What is a tensor stays on its device, unread, until the metrics are read."""

    def __init__(self) -> None:
        self._pairs: dict[str, _Pair] = {}

    def add(self, name: str, total: Tensor | float, count: Tensor | float) -> None:
        """Add to one metric; tensors are detached."""
        new = _Pair(_wide(total), _wide(count))
        old = self._pairs.get(name)
        self._pairs[name] = new if old is None else _Pair(*(_sum(a, b) for a, b in zip(old, new, strict=True)))

    def mean(self, name: str, values: Tensor, of: Tensor | None = None) -> None:
        """Add values that are averaged over their number; with a mask `of`, those where it is true."""
        if of is None:
            self.add(name, values.detach().sum(), float(values.numel()))
        else:
            self.add(name, values.detach().where(of, 0).sum(), of.sum())

    def merge(self, other: MeanMetrics) -> None:
        """Add all of another."""
        for name, pair in other._pairs.items():
            self.add(name, *pair)

    def names(self) -> Iterable[str]:
        return sorted(self._pairs)

    def packed(self, names: Iterable[str], device: torch.device) -> Tensor:
        """Sums and counts `[len(names), 2]` of these metrics (0 where absent), to add up over processes."""
        found = self.as_dict()
        return torch.tensor([found.get(name, (0.0, 0.0)) for name in names], dtype=torch.float64).to(device).view(-1, 2)

    def as_dict(self) -> dict[str, tuple[float, float]]:
        """Sum and count of each metric, as numbers: here the host waits, once for each device."""
        tensors = [value for pair in self._pairs.values() for value in pair if isinstance(value, Tensor)]
        read: dict[int, float] = {}
        for device in {tensor.device for tensor in tensors}:
            own = [tensor for tensor in tensors if tensor.device == device]
            read |= zip(map(id, own), torch.stack(own).tolist(), strict=True)
        return {name: (_number(pair.total, read), _number(pair.number, read)) for name, pair in self._pairs.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Sequence[float]]) -> MeanMetrics:
        """The inverse of `as_dict`."""
        metrics = cls()
        for name, (total, count) in values.items():
            metrics.add(name, total, count)
        return metrics

    def averages(self) -> dict[str, float]:
        """Sum / count of each metric; those that nothing was added to are left out."""
        return {name: total / count for name, (total, count) in sorted(self.as_dict().items()) if count}


def _wide(value: Tensor | float) -> Tensor | float:
    if not isinstance(value, Tensor):
        return float(value)
    return value.detach().to(torch.float32 if value.device.type == "mps" else torch.float64)  # mps has no float64


def _sum(a: Tensor | float, b: Tensor | float) -> Tensor | float:
    """The sum, where both are tensors on the device of the second."""
    return a.to(b.device, non_blocking=True) + b if isinstance(a, Tensor) and isinstance(b, Tensor) else a + b


def _number(value: Tensor | float, read: Mapping[int, float]) -> float:
    return read[id(value)] if isinstance(value, Tensor) else value
