"""Whether a model can read several sequences in one row."""

from __future__ import annotations

from inspect import signature

import torch
from torch import nn

from dpkd.data.batches import PLAIN, Batch, Layout, TokenSequence, collate
from dpkd.models.attention import FLASH, computes_in, implementation, windowed
from dpkd.models.head import causal_lm, evaluating, hidden_rows, repeated_blocks

# Weights of a layer from which saved padding is worth it on a CPU that each sequence is attended to by itself: layers
# of 790,000 gained nearly what was saved, and layers of 50,000 lost more than that.
PACKS_FROM = 500_000


def worth_packing(model: nn.Module) -> bool:
    """Whether layers are so large that packed rows pay on a CPU, where they save a tenth of the tokens."""
    return sum(p.numel() for block in repeated_blocks(model)[:1] for p in block.parameters()) >= PACKS_FROM


def probe_batch(model: nn.Module, layout: Layout) -> Batch:
    """Two responses to each of two prompts, of different lengths, on the device of a model."""
    embeddings = causal_lm(model).get_input_embeddings().weight
    ids = [i % embeddings.shape[0] for i in range(64)]
    sequences = [TokenSequence(ids[i : i + 7 + i], ids[20 + 8 * i + j : 30 + 8 * i]) for i in (0, 1) for j in (0, 2)]
    return collate(sequences, pad_id=0, layout=layout).to(embeddings.device)


@torch.no_grad()
def why_not(model: nn.Module, layout: Layout) -> str | None:
    """Why a model cannot run a layout, or None: known limits first, then a probe against separate rows."""
    lm = causal_lm(model)
    kind = implementation(lm)
    if kind not in ("sdpa", "eager", "flex_attention") and not (kind in FLASH and not layout.shared):
        return f"its attention ({kind}) does not support this mask"
    if "position_ids" not in signature(lm.base_model.forward).parameters:
        return "it computes positions by itself"
    if windowed(lm.config.get_text_config()):
        return "some of its layers do not attend to all earlier tokens"
    if kind in FLASH:  # only half precision on a GPU: the probe would tell nothing
        return None
    try:
        with evaluating(model):  # dropout would differ
            apart, together = (hidden_rows(model, probe_batch(model, one)).float() for one in (PLAIN, layout))
    except Exception as error:  # of an attention that lacks a kernel for this model
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    tolerance = 1e-3 if computes_in(lm) in (torch.float32, torch.float64) else 0.1
    gap = float((apart - together).abs().max() / apart.abs().max().clamp(min=1e-6))
    return None if gap < tolerance else f"its hidden states change (by {gap:.2g})"
