"""Functions that are run again and again over the same memory: on CUDA recorded once as a graph, and replayed."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
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


class NotStatic(Exception):
    """What should run again over fixed memory cannot, here or at all."""


class RefuseHostReads(TorchDispatchMode):
    """Raises NotStatic at an operator whose result the host reads: a capture would break at it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in HOST_READS:
            raise NotStatic(f"the model reads values on the host ({func})")
        return func(*args, **(kwargs or {}))


class Recorder:
    """Records functions of one device. Their graphs share one memory, so that one of them runs at a time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        on_cuda = device.type == "cuda"
        self._side = torch.cuda.Stream(device) if on_cuda else None
        self._pool = torch.cuda.graph_pool_handle() if on_cuda else None
        self._broken: list[Any] = []

    @property
    def records(self) -> bool:
        """Whether there are graphs on this device; elsewhere a recorded function is the function."""
        return self._side is not None

    def rehearse(self, function: Callable[[], None], *, refuse_host_reads: bool = True) -> None:
        """Run a function where it will be recorded. Raises NotStatic if the host reads a value in it."""
        with RefuseHostReads() if refuse_host_reads else nullcontext():  # type: ignore[no-untyped-call]
            if self._side is None:
                function()
                return
            self._side.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self._side):
                function()
            torch.cuda.current_stream(self.device).wait_stream(self._side)

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        """What runs the function again. On CUDA it is recorded now, not run, and writes where it writes now."""
        if self._side is None:
            return function
        graph = torch.cuda.CUDAGraph()
        self._side.wait_stream(torch.cuda.current_stream(self.device))
        # Not torch.cuda.graph, which empties the allocator's cache each time.
        with _nothing_collected(), torch.cuda.stream(self._side):
            # Only this thread's calls matter: others may prepare batches meanwhile.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                function()
                graph.capture_end()
            except BaseException:
                with suppress(RuntimeError):
                    graph.capture_end()
                # The allocator may take this recording for one that goes on, and refuses the next into its memory.
                self._broken.append(graph)
                self._pool = torch.cuda.graph_pool_handle()
                raise
        torch.cuda.current_stream(self.device).wait_stream(self._side)
        return graph.replay


@contextmanager
def _nothing_collected() -> Iterator[None]:
    """No garbage is collected: that of earlier graphs and events is freed by calls that would break a recording."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


class Replay:
    """Runs a step: on CUDA eagerly at first, then as a graph; elsewhere as it is. The first one is checked."""

    def __init__(self, step: Callable[[], None], recorder: Recorder) -> None:
        self._step, self._recorder = step, recorder
        self._calls = 0
        self._replay: Callable[[], None] | None = None

    def __call__(self) -> None:
        """One step."""
        if self._replay is not None:
            self._replay()
        elif self._calls < WARM_UP:
            self._recorder.rehearse(self._step, refuse_host_reads=self._calls == 0)
            self._calls += 1
        else:
            self._replay = self._recorder.record(self._step)
            self._replay()
