"""Backbones whose forward and backward passes are CUDA graphs, one of each for every shape of a batch.

The layers of a model are thousands of short kernels, and a GPU waits for the host that launches them. A graph launches
them at once, over fixed memory: ids are copied in, hidden states out, and gradients are added up in buffers that are
the weights' `grad`. Shapes: R rows, T tokens, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dpkd.models.attention import recomputes
from dpkd.models.cuda_graphs import NotStatic, Recorder

# Ids [R, T], a mask and positions [R, T] to hidden states [R, T, H].
Backbone = Callable[[Tensor, Any, Tensor], Tensor]

MOST = 32  # shapes that are recorded
MOST_FAILURES = 3  # shapes that could not be, until nothing is recorded any more
LARGEST_GAP = 0.05  # between what was computed before and after, of the largest number
ATTRIBUTE = "_dpkd_captured"


class BackboneInputs(NamedTuple):
    """What a backbone reads."""

    input_ids: Tensor
    mask: Tensor | None
    position_ids: Tensor

    def shape(self) -> Hashable:
        """Shapes, with all else that decides what a pass computes."""
        return (*(one.shape for one in self if one is not None), self.kind())

    def kind(self) -> Hashable:
        """What decides which operators run."""
        device = self.input_ids.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        return None if self.mask is None else self.mask.dtype, autocast, torch.is_grad_enabled()


class RecordedPasses:
    """Forward and backward pass of one shape; without a gradient the forward pass alone.

    `weights` has those that a gradient reaches, and where it is added up.
    """

    def __init__(self, backbone: Backbone, inputs: BackboneInputs, weights: dict[nn.Parameter, Tensor]) -> None:
        self._backbone, self.weights = backbone, weights
        self._inputs = BackboneInputs(*(None if one is None else one.clone() for one in inputs))  # type: ignore[arg-type]
        self._autocast = _without_cache(inputs.input_ids.device.type)
        self._anchor = torch.zeros((), device=inputs.input_ids.device, requires_grad=True)
        self.hidden: Tensor
        self._grad: Tensor | None = None
        self._forward: Callable[[], None]
        self._backward: Callable[[], None]

    def record(self, recorder: Recorder) -> None:
        """Record both passes. In about the time that it takes to run them."""
        with torch.set_grad_enabled(bool(self.weights)):
            self._forward = recorder.record(self._run)
            self._grad = torch.zeros_like(self.hidden) if recorder.records else None
            self._backward = recorder.record(self._run_back) if self.weights else lambda: None
        if recorder.records:
            self.hidden = self.hidden.detach()  # autograd's graph has been recorded

    def record_checked(self, recorder: Recorder, *, compiled: bool = False) -> None:
        """Run the passes, record them, and compare what they compute; what no gradient reaches is left out.

        Raises NotStatic if they cannot be recorded, or do not compute the same. No random number is used up. Compiled
        layers are not looked at for reads of the host: under a dispatch mode they would run as they were written.
        """
        random = _random_state(recorder.device)
        with _kept(self.weights), torch.set_grad_enabled(bool(self.weights)):
            recorder.rehearse(self._first, refuse_host_reads=not compiled)
            expected, direction = self._computed(), self._grad
            self.record(recorder)
            _zero(self.weights.values())
            _random_state(recorder.device, random)  # dropout again as it was
            self._forward()
            if direction is not None:
                self._set_grad(direction)
            self._backward()
            found = self._computed()
        _random_state(recorder.device, random)
        gap = max(
            float((now - before).abs().max() / before.abs().max().clamp(min=1e-6))
            for now, before in zip(found, expected, strict=True)
        )
        if not gap <= LARGEST_GAP:
            raise NotStatic(f"its numbers change (by {gap:.2g})")

    def __call__(self, inputs: BackboneInputs) -> Tensor:
        """The hidden states `[R, T, H]`, valid until the next call."""
        for own, new in zip(self._inputs, inputs, strict=True):
            if own is not None and new is not None:
                own.copy_(new)
        if not self.weights:
            self._forward()
            return self.hidden
        return _Recorded.apply(self._anchor, self)  # type: ignore[no-any-return, no-untyped-call]

    def forward(self) -> Tensor:
        """The hidden states of the inputs."""
        with torch.enable_grad():
            self._forward()
        return self.hidden.detach()

    def backward(self, grad: Tensor) -> None:
        """Add to the gradients of the weights, which are the buffers from now on."""
        others = [(buffer, p) for p, buffer in self.weights.items() if p.grad is not buffer]
        _zero([buffer for buffer, p in others if p.grad is None])
        earlier = [(buffer, p.grad) for buffer, p in others if p.grad is not None]
        _copy([buffer for buffer, _ in earlier], [one for _, one in earlier])
        for buffer, p in others:
            p.grad = buffer
        self._set_grad(grad)
        self._backward()

    def _set_grad(self, grad: Tensor) -> None:
        if self._grad is None:
            self._grad = torch.zeros_like(grad)
        self._grad.copy_(grad)

    def _run(self) -> None:
        with self._autocast():
            self.hidden = self._backbone(*self._inputs)

    def _run_back(self) -> None:
        grads = torch.autograd.grad(self.hidden, [*self.weights], self._grad)
        torch._foreach_add_([*self.weights.values()], [*grads])

    def _first(self) -> None:
        """The passes as they are; what no gradient reaches is left out from now on."""
        self._run()
        if not self.weights:
            return
        self._grad = torch.arange(self.hidden.numel(), device=self.hidden.device).sin().view_as(self.hidden)
        self._grad = self._grad.to(self.hidden.dtype)
        grads = torch.autograd.grad(self.hidden, [*self.weights], self._grad, allow_unused=True)
        reached = [(p, grad) for p, grad in zip(self.weights, grads, strict=True) if grad is not None]
        self.weights = {p: self.weights[p] for p, _ in reached}
        _copy(self.weights.values(), [grad for _, grad in reached])

    def _computed(self) -> list[Tensor]:
        """Hidden states, and the gradients of a first and a last weight."""
        buffers = [buffer for buffer in self.weights.values() if buffer.ndim > 1]
        return [one.detach().float().clone() for one in (self.hidden, *buffers[:1], *buffers[-1:])]


class _Recorded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, passes: RecordedPasses) -> Tensor:
        ctx.passes = passes
        return passes.forward()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        ctx.passes.backward(*grad_outputs)
        return None, None


class CapturedBackbone:
    """The passes of one backbone; it runs as it is for a shape that fails, and for all after MOST_FAILURES of them."""

    def __init__(self, module: nn.Module, say: Callable[[str], None]) -> None:
        self._module, self._say = module, say
        self._parameters = [*module.parameters()]  # to walk through the modules takes a millisecond
        self._recorder = Recorder(self._parameters[0].device)
        self._buffers: dict[nn.Parameter, Tensor] = {}
        self._passes: dict[Hashable, RecordedPasses] = {}
        self._reached: dict[Hashable, dict[nn.Parameter, Tensor]] = {}  # by a gradient, for each kind of pass
        self._failed: set[Hashable] = set()
        self._places: list[int] = []
        self.paused = False

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copy of the model has weights of its own: nothing is recorded of it."""

    def __call__(self, backbone: Backbone, *inputs: Any) -> Tensor:
        """The hidden states `[R, T, H]` that the backbone gives."""
        read = BackboneInputs(*inputs)
        if self.paused or not (read.mask is None or isinstance(read.mask, Tensor)):
            return backbone(*inputs)
        if (places := [p.data_ptr() for p in self._parameters]) != self._places:
            self._places = places
            self._passes.clear()  # weights have moved: graphs would read where they were
        shape = (self._module.training, read.shape())
        if shape in self._failed or (shape not in self._passes and len(self._passes) >= MOST):
            return backbone(*inputs)
        if shape not in self._passes:
            try:
                self._passes[shape] = self._recorded(backbone, read)
            except Exception as error:  # a run does not end because an optimization does not work
                self._failed.add(shape)
                if isinstance(error, NotStatic) or len(self._failed) == MOST_FAILURES:
                    self._fail(error)
                return backbone(*inputs)
        return self._passes[shape](read)

    def _recorded(self, backbone: Backbone, read: BackboneInputs) -> RecordedPasses:
        """The passes of a new shape: the first of its kind is checked, and so is one that fails."""
        kind = (self._module.training, read.kind())
        compiled = any(part._compiled_call_impl is not None for part in self._module.modules())
        if kind in self._reached and not compiled:  # the compiler may be called for a new shape: not in a capture
            passes = RecordedPasses(backbone, read, self._reached[kind])
            with suppress(RuntimeError):
                passes.record(self._recorder)
                return passes
        passes = RecordedPasses(backbone, read, self._trained())
        passes.record_checked(self._recorder, compiled=compiled)
        self._reached[kind] = passes.weights
        return passes

    def _trained(self) -> dict[nn.Parameter, Tensor]:
        """The weights that get a gradient, and where it is added up."""
        if not torch.is_grad_enabled():
            return {}
        for p in self._parameters:
            if p.requires_grad and p not in self._buffers:
                self._buffers[p] = torch.zeros_like(p)
        return self._buffers

    def _fail(self, error: Exception) -> None:
        self.paused = True
        for kept in (self._passes, self._reached, self._buffers):
            kept.clear()
        self._say(f"no CUDA graphs of {type(self._module).__name__}: {' '.join(str(error).split())[:200]}")


def capture(lm: Any, say: Callable[[str], None]) -> None:
    """Record the passes of a causal LM's backbone from now on, unless it computes activations again.

    `say` is told where that does not work. What calls `dpkd.models.head.hidden_states` gets them.
    """
    backbone = lm.base_model
    if not recomputes(lm):
        setattr(backbone, ATTRIBUTE, CapturedBackbone(backbone, say))


def captured(backbone: nn.Module) -> CapturedBackbone | None:
    """What records the passes of a backbone, if something does."""
    return vars(backbone).get(ATTRIBUTE)


def release(lm: Any) -> None:
    """Run a backbone as it is again, and give the memory of its graphs back."""
    vars(lm.base_model).pop(ATTRIBUTE, None)


@contextmanager
def paused(*lms: Any) -> Iterator[None]:
    """Backbones run as they are inside the block."""
    found = [one for lm in lms if (one := captured(lm.base_model)) is not None]
    before = [one.paused for one in found]
    for one in found:
        one.paused = True
    try:
        yield
    finally:
        for one, was in zip(found, before, strict=True):
            one.paused = was


def _without_cache(kind: str) -> Callable[[], torch.autocast]:
    """The autocast of now, whose copies of weights are made in the pass: a graph would keep those of the first step."""
    on, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    return lambda: torch.autocast(kind, dtype=dtype, enabled=on, cache_enabled=False)


def _random_state(device: torch.device, state: Tensor | None = None) -> Tensor:
    """The state of a device's random numbers, which is set where one is given."""
    of: Any = torch.cuda if device.type == "cuda" else torch
    where = (device,) if device.type == "cuda" else ()
    if state is not None:
        of.set_rng_state(state, *where)
    return of.get_rng_state(*where)  # type: ignore[no-any-return]


@contextmanager
def _kept(weights: dict[nn.Parameter, Tensor]) -> Iterator[None]:
    """The buffers that are gradients already, of other micro-batches of the step, are the same after the block."""
    kept = [(buffer, buffer.clone()) for p, buffer in weights.items() if p.grad is buffer]
    try:
        yield
    finally:
        for buffer, before in kept:
            buffer.copy_(before)


def _zero(buffers: Any) -> None:
    if some := [*buffers]:
        torch._foreach_zero_(some)


def _copy(buffers: Any, values: Any) -> None:
    if some := [*buffers]:
        torch._foreach_copy_(some, [*values])
