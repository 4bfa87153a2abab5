"""A step that is run again and again over the same memory: on CUDA captured once as a graph, and replayed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Steps that run eagerly before a window is captured: libraries set themselves up at their first calls.
WARM_UP = 2
HOST_READS = frozenset(
    {
        torch.ops.aten._local_scalar_dense,
        torch.ops.aten.nonzero,
        torch.ops.aten.masked_select,
        torch.ops.aten._unique2,
        torch.ops.aten.equal,
    }
)


class CannotDecodeStatically(Exception):
    """These models, or this device, need caches that grow."""


class RefuseHostReads(TorchDispatchMode):
    """Raises CannotDecodeStatically at an operator whose result the host reads: a capture would break at it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in HOST_READS:
            raise CannotDecodeStatically(f"the model reads values on the host ({func})")
        return func(*args, **(kwargs or {}))


class Replay:
    """Runs a step: on CUDA eagerly at first, then as a graph; elsewhere as it is. The first one is checked."""

    def __init__(
        self, step: Callable[[], None], device: torch.device, side: torch.cuda.Stream | None, pool: Any
    ) -> None:
        self._step, self._device, self._side, self._pool = step, device, side, pool
        self._calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        """One step."""
        if self._calls == 0:
            with RefuseHostReads():  # type: ignore[no-untyped-call]
                self._eagerly()
        elif self._side is None or self._calls < WARM_UP:
            self._eagerly()
        else:
            if self._graph is None:
                graph = torch.cuda.CUDAGraph()
                # Only this thread's calls matter: others may prepare batches meanwhile.
                with torch.cuda.graph(graph, pool=self._pool, stream=self._side, capture_error_mode="thread_local"):
                    self._step()  # recorded, not run
                self._graph = graph
            self._graph.replay()

    def _eagerly(self) -> None:
        self._calls += 1
        if self._side is None:
            self._step()
            return
        self._side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._side):
            self._step()
        torch.cuda.current_stream(self._device).wait_stream(self._side)
