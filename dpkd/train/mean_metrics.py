"""Metrics as metrics and counts, so that micro-batches and processes add up to exactly what one batch would give."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor


class MeanMetrics:
    """Named (sum, count) pairs on the device, without a synchronisation until they are read."""

    def __init__(self) -> None:
        self._pairs: dict[str, Tensor] = {}

    def add(self, name: str, total: Tensor | float, count: Tensor | float) -> None:
        """Add to one metric; tensors are detached."""
        device = total.device if isinstance(total, Tensor) else torch.device("cpu")
        dtype = torch.float32 if device.type == "mps" else torch.float64  # mps has no float64
        pair = torch.stack([torch.as_tensor(v, dtype=dtype, device=device).detach() for v in (total, count)])
        self._pairs[name] = self._pairs[name] + pair.to(self._pairs[name].device) if name in self._pairs else pair

    def mean(self, name: str, values: Tensor) -> None:
        """Add values that are averaged over their number."""
        self.add(name, values.detach().sum(), float(values.numel()))

    def merge(self, other: MeanMetrics) -> None:
        """Add all of another."""
        for name, pair in other._pairs.items():
            own = self._pairs.get(name)
            self._pairs[name] = pair if own is None else own.to(pair.device) + pair

    def names(self) -> Iterable[str]:
        return sorted(self._pairs)

    def packed(self, names: Iterable[str], device: torch.device) -> Tensor:
        """MeanMetrics and counts `[len(names), 2]` of these metrics (0 where absent), to add up over processes."""
        zero = torch.zeros(2, dtype=torch.float64, device=device)
        pairs = [self._pairs.get(name, zero).to(device) for name in names]
        return torch.stack(pairs) if pairs else zero.new_zeros(0, 2)

    def as_dict(self) -> dict[str, tuple[float, float]]:
        """Sum and count of each metric, as numbers."""
        return {name: (float(pair[0]), float(pair[1])) for name, pair in self._pairs.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Sequence[float]]) -> MeanMetrics:
        """The inverse of `as_dict`."""
        metrics = cls()
        for name, (total, count) in values.items():
            metrics.add(name, total, count)
        return metrics

    def averages(self) -> dict[str, float]:
        """Sum / count of each metric; those that nothing was added to are left out."""
        pairs = {name: pair.tolist() for name, pair in sorted(self._pairs.items())}
        return {name: total / count for name, (total, count) in pairs.items() if count}
