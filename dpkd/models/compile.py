"""torch.compile where it pays: the repeated block of a model once, instead of the model whole; a loss on a chunk.

Nothing here ends a run: what does not compile, or gives other numbers, runs as it is, and the reason is returned.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from dpkd.models.head import causal_lm, evaluating, hidden_states

BACKEND = "inductor"
# Student and teacher may be of one class: training, evaluation and both types each take an entry of the cache.
ENTRIES = 32
# Optimizer steps from which `auto` compiles: half a minute must be won back, and an H200 saved 30 to 170 ms a step
# (docs/performance.md).
WORTH_STEPS = 500


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The layers of a model: the list of modules of one class that holds the most weights."""
    lists = [
        list(module)
        for module in causal_lm(model).base_model.modules()
        if isinstance(module, nn.ModuleList) and len({type(one) for one in module}) == 1
    ]
    return max(lists, key=lambda blocks: sum(p.numel() for one in blocks for p in one.parameters()), default=[])


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
    for block in repeated_blocks(model):
        block._compiled_call_impl = None


def compile_checked(model: nn.Module) -> str | None:
    """Compile the layers, and compare a forward and backward pass with the model as it was; why not, or None."""
    expected = _probe(model)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the compiler, about itself
            reason = None if compile_blocks(model) else "it has no repeated layers"
            gaps = [_gap(now, before) for now, before in zip(_probe(model), expected, strict=True)]
        if reason is None and max(gaps) > 0.1:
            reason = f"its numbers change (by {max(gaps):.2g})"
    except Exception as error:
        reason = _sentence(error)
    if reason is not None:
        undo(model)
    return reason


def compile_loss(loss: nn.Module, x: Any) -> str | None:
    """Compile a loss in place, for any number of rows; why it is not one graph on inputs like `x`, or None."""
    if (reason := why_no_graph(loss, x)) is not None:
        return reason
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loss.compile(backend=BACKEND, dynamic=True)
            loss(x).sum().backward()
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


def _gap(now: Tensor, before: Tensor) -> float:
    return float((now - before).abs().max() / before.abs().max().clamp(min=1e-6))


def _probe(model: nn.Module) -> list[Tensor]:
    """Hidden states of a few ids, and where weights are trained the gradient of one of them."""
    weights = [p for block in repeated_blocks(model) for p in block.parameters() if p.requires_grad and p.ndim == 2][:1]
    embeddings = causal_lm(model).get_input_embeddings().weight
    ids = torch.arange(2 * 16, device=embeddings.device).remainder(embeddings.shape[0]).view(2, 16)
    positions = torch.arange(16, device=ids.device).expand(2, -1)
    with evaluating(model):  # dropout would differ
        with (
            torch.set_grad_enabled(bool(weights)),
            torch.autocast(ids.device.type, torch.bfloat16, enabled=ids.device.type == "cuda"),
        ):
            hidden = hidden_states(model, ids, torch.ones_like(ids), positions).float()
        grads = torch.autograd.grad(hidden.square().mean(), weights) if weights else ()
    return [hidden.detach(), *(g.float() for g in grads)]
