"""Whether a model can read several sequences in one row."""

from __future__ import annotations

from inspect import signature

import torch
from torch import nn

from dpkd.data.batches import PLAIN, Layout, TokenSequence, collate
from dpkd.models.attention import VARLEN, implementation, windowed
from dpkd.models.head import causal_lm, evaluating, hidden_rows

# Two prompts of different length, two responses each.
_PROBE = (((4, 5, 6), (7, 8)), ((9, 4), (5,)), ((4, 5, 6), (10, 11, 7, 8)), ((9, 4), (6, 9, 10)))


@torch.no_grad()
def why_not(model: nn.Module, layout: Layout) -> str | None:
    """Why a model cannot run a layout, or None: known limits first, then a probe against separate rows."""
    lm = causal_lm(model)
    kind = implementation(lm)
    if kind not in ("sdpa", "eager", "flex_attention") and not (kind in VARLEN and not layout.shared):
        return f"its attention ({kind}) does not support this mask"
    if "position_ids" not in signature(lm.base_model.forward).parameters:
        return "it computes positions by itself"
    if windowed(lm.config.get_text_config()):
        return "some of its layers do not attend to all earlier tokens"
    if kind in VARLEN:  # only half precision on a GPU: the probe would tell nothing
        return None
    device, ids = next(lm.parameters()).device, lm.get_input_embeddings().num_embeddings
    sequences = [TokenSequence(*(tuple(token % ids for token in part) for part in sequence)) for sequence in _PROBE]
    with evaluating(model):  # dropout would differ
        apart, together = (
            hidden_rows(model, collate(sequences, pad_id=0, layout=one).to(device)).float() for one in (PLAIN, layout)
        )
    tolerance = 1e-3 if next(lm.parameters()).dtype in (torch.float32, torch.float64) else 0.1
    gap = float((apart - together).abs().max() / apart.abs().max().clamp(min=1e-6))
    return None if gap < tolerance else f"its hidden states change (by {gap:.2g})"
