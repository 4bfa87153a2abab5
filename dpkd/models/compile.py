"""torch.compile where it pays: the repeated block of a model once, instead of the model whole."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dpkd.models.head import causal_lm, hidden_states

# Student and teacher may be of one class: training, evaluation and both types each take an entry.
ENTRIES = 32


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The layers of a model: the list of modules of one class that holds the most weights."""
    lists = [
        list(module)
        for module in causal_lm(model).base_model.modules()
        if isinstance(module, nn.ModuleList) and len({type(one) for one in module}) == 1
    ]
    return max(lists, key=lambda blocks: sum(p.numel() for one in blocks for p in one.parameters()), default=[])


def compile_blocks(model: nn.Module, backend: Any = "inductor") -> int:
    """Compile the layers of a model in place, for any length; returns how many. Names of weights stay.

    The layers share one compiled code: compiling costs what one layer costs.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, ENTRIES)
    blocks = repeated_blocks(model)
    for block in blocks:
        block.compile(backend=backend, dynamic=True)
    return len(blocks)


def undo(model: nn.Module) -> None:
    """Run the layers of a model as they are again."""
    for block in repeated_blocks(model):
        block._compiled_call_impl = None


@torch.no_grad()
def _probe(model: nn.Module) -> torch.Tensor:
    lm = causal_lm(model)
    embeddings = lm.get_input_embeddings().weight
    ids = torch.arange(2 * 16, device=embeddings.device).remainder(embeddings.shape[0]).view(2, 16)
    positions = torch.arange(16, device=ids.device).expand(2, -1)
    was_training = model.training
    model.eval()
    try:
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=ids.device.type == "cuda"):
            return hidden_states(model, ids, torch.ones_like(ids), positions).float()
    finally:
        model.train(was_training)


def compile_checked(model: nn.Module, backend: Any = "inductor") -> str | None:
    """Compile the layers, and compare a probe with the model as it was; why they are not compiled, or None."""
    expected = _probe(model)
    try:
        if compile_blocks(model, backend) == 0:
            return "it has no repeated layers"
        gap = float((_probe(model) - expected).abs().max() / expected.abs().max().clamp(min=1e-6))
        reason = None if gap < 0.1 else f"its hidden states change (by {gap:.2g})"
    except Exception as error:  # of a compiler, a driver: a run does not end because an optimization does not work
        reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"
    if reason is not None:
        undo(model)
    return reason
