"""torch.compile where it pays: the repeated block of a model once, instead of the model whole; a loss on a chunk.

Nothing here ends a run: what does not compile, or gives other numbers, runs as it is, and the reason is returned.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from dpkd.data.batches import PLAIN, Layout
from dpkd.models.attention import computes_in
from dpkd.models.captured import paused, release
from dpkd.models.head import causal_lm, evaluating, hidden_rows, repeated_blocks
from dpkd.models.layouts import probe_batch

BACKEND = "inductor"
# Entries of the cache of one class of layers: each size, type and mode takes one, and a sweep has many models.
ENTRIES = 128
# What `auto` compiles for where the host launches each kernel: half a minute must be won back, and an H200 saved 30 to
# 170 ms a step. Where CUDA graphs launch them, and norms and activations are one kernel each, nothing is left to win.
WORTH_STEPS = 300

Context = Callable[[], AbstractContextManager[Any]]


def compile_blocks(model: nn.Module, backend: Any = None) -> int:
    """Compile the layers of a model in place, for any length; returns how many. Names of weights stay.

    The layers share one compiled code: compiling costs what one layer costs.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, ENTRIES)
    blocks = repeated_blocks(model)
    for block in blocks:
        block.compile(backend=backend or BACKEND, dynamic=True)
    return len(blocks)


def undo(model: nn.Module) -> None:
    """Run the layers of a model as they are again."""
    release(causal_lm(model))
    for block in repeated_blocks(model):
        block._compiled_call_impl = None


@contextmanager
def uncompiled(*models: nn.Module) -> Iterator[None]:
    """Models run as they are inside the block: for shapes, caches and modes that compiled layers were not made for.

    Nothing is recorded either.
    """
    compiled = any(part._compiled_call_impl is not None for model in models for part in model.modules())
    with torch.compiler.set_stance("force_eager") if compiled else nullcontext(), paused(*map(causal_lm, models)):
        yield


def code_of(model: nn.Module) -> Hashable:
    """What the compiled code of the layers depends on: models with the same one share it in a process."""
    blocks = repeated_blocks(model)
    if not blocks:
        return None
    weights = [(name, p.shape, p.dtype, p.requires_grad) for name, p in blocks[0].named_parameters()]
    return type(blocks[0]), tuple(weights)


def compile_checked(
    model: nn.Module, autocast: Context = nullcontext, layouts: Sequence[Layout] = (PLAIN,)
) -> str | None:
    """Compile the layers, and compare a forward and backward pass with the model as it was; why not, or None.

    The pass is what a training step does, under its `autocast` and with rows of its `layouts`: what is compiled for the
    comparison is the code of the run. Compiled code rounds elsewhere, and trained models in half precision make much of
    that: what one rounding of the embeddings changes is the measure.
    """
    try:
        expected, again = (_probe(model, autocast, layouts) for _ in range(2))
        dropout = max(_gaps(again, expected)) > 0.01
        with evaluating(model) if dropout else nullcontext(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the compiler, about itself
            expected = _probe(model, autocast, layouts)
            with _rounded_embeddings(model, autocast):
                noise = _gaps(_probe(model, autocast, layouts), expected)
            reason = None if compile_blocks(model) else "it has no repeated layers"
            gaps = _gaps(_probe(model, autocast, layouts), expected)
        if reason is None and (beyond := [g for g, n in zip(gaps, noise, strict=True) if not g <= max(0.1, 3 * n)]):
            reason = f"its numbers change (by {max(beyond):.2g})"
    except Exception as error:
        reason = _sentence(error)
    if reason is not None:
        undo(model)
    return reason


def compile_loss(loss: nn.Module, inputs: Callable[[], Any]) -> str | None:
    """Compile a loss in place, for any number of rows; why it is not one graph on inputs like these, or None.

    `inputs` makes new ones: those that a loss has read have log-probs, which a graph would be compiled to take.
    """
    if (reason := why_no_graph(loss, inputs())) is not None:
        return reason
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loss.compile(backend=BACKEND, dynamic=True)
            loss(inputs()).sum().backward()
    except Exception as error:
        reason = _sentence(error)
        loss._compiled_call_impl = None
    return reason


def why_no_graph(loss: nn.Module, x: Any) -> str | None:
    """Why a loss cannot be traced into one graph on inputs like `x`, or None. Nothing is compiled."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.compile(loss, backend="eager", fullgraph=True, dynamic=True)(x)
    except Exception as error:
        return _sentence(error)
    return None


def _sentence(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _gaps(now: list[Tensor], before: list[Tensor]) -> list[float]:
    """The largest difference of each two, as a share of the largest number."""
    return [
        float((one - other).abs().max() / other.abs().max().clamp(min=1e-6))
        for one, other in zip(now, before, strict=True)
    ]


@contextmanager
def _rounded_embeddings(model: nn.Module, autocast: Context) -> Iterator[None]:
    """The embeddings have one more rounding inside the block, of the type of the model's products."""
    with autocast():
        eps = torch.finfo(computes_in(model)).eps

    def rounded(_module: nn.Module, _given: Any, out: Tensor) -> Tensor:
        signs = torch.arange(out.numel(), device=out.device).cos().sign().view_as(out)
        return (out.float() * (1 + eps * signs)).to(out.dtype)

    handle = causal_lm(model).get_input_embeddings().register_forward_hook(rounded)
    try:
        yield
    finally:
        handle.remove()


def _probe(model: nn.Module, autocast: Context, layouts: Sequence[Layout]) -> list[Tensor]:
    """For each layout hidden states of a few ids, and where weights are trained the gradient of one of them.

    It is that of a product with fixed numbers: after a norm, the sum of squares is constant and its gradient noise.
    """
    weights = [p for block in repeated_blocks(model) for p in block.parameters() if p.requires_grad and p.ndim == 2][:1]
    found = []
    for layout in layouts:
        with torch.set_grad_enabled(bool(weights)), autocast():
            hidden = hidden_rows(model, probe_batch(model, layout)).float()
        direction = torch.arange(hidden.numel(), device=hidden.device).sin().view_as(hidden)
        grads = torch.autograd.grad((hidden * direction).sum(), weights) if weights else ()
        found += [hidden.detach(), *(g.float() for g in grads)]
    return found
