"""Which tokens a token sees, where a row holds more than one sequence: its own prompt, and its own response.

Shapes: R rows, T tokens of a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpkd import functional

if TYPE_CHECKING:
    from dpkd.data.batches import Batch

# Attention over sequences of different length without padding, by packages of their own.
FLASH = ("flash_attention_2", "flash_attention_3", "flash_attention_4")

# Where PyTorch has a kernel for that itself.
KERNEL_ON = ("cuda",)


def visible(spans: Tensor) -> Tensor:
    """`[R, T, T]` whether the token of a row (second place) sees the token of a column (third).

    It sees what comes before it and belongs to the same prompt: the prompt itself, and its own response.
    `spans` is that of `Batch`.
    """
    tree_RT, branch_RT = spans
    time = torch.arange(tree_RT.shape[1], device=spans.device)
    same_tree = tree_RT.unsqueeze(2) == tree_RT.unsqueeze(1)
    trunk_or_own = (branch_RT == 0).unsqueeze(1) | (branch_RT.unsqueeze(2) == branch_RT.unsqueeze(1))
    seen: Tensor = same_tree & trunk_or_own & (time.unsqueeze(1) >= time)
    return seen


def implementation(model: nn.Module) -> str:
    """What computes the model's attention: sdpa, eager, flex_attention, flash_attention_2 ..."""
    return str(model.config._attn_implementation)  # type: ignore[union-attr]


# The names in transformers of attention of our own, which take the place of its sdpa attention inside `attending`.
CAUSAL = "dpkd_causal"
PACKED = "dpkd_packed"


def windowed(config: Any) -> bool:
    """Whether a layer looks at a window, or is no attention at all."""
    kinds = getattr(config, "layer_types", None) or getattr(config, "attention_layers", None)
    if kinds:
        return any(kind not in ("full_attention", "global") for kind in kinds)
    return bool(getattr(config, "sliding_window", None)) and getattr(config, "use_sliding_window", True)


@contextmanager
def attending(lm: Any, batch: Batch) -> Iterator[Any]:
    """The mask that the model's attention takes inside the block, where it may be one that is faster than its own.

    Without padding (`Batch.ends`) it goes from sequence to sequence. In rows of one sequence, padded on the right as
    `collate` does, what is read sees no padding: it comes later. On a GPU attention is then causal without a mask, has
    its fastest kernel, and nobody looks whether a mask is needed, for which the host would wait.
    """
    name, mask = _faster(lm, batch)
    if name is None:
        yield attention_mask(lm, batch)
        return
    lm.config._attn_implementation = name
    try:
        yield mask
    finally:
        lm.config._attn_implementation = "sdpa"


def _faster(lm: Any, batch: Batch) -> tuple[str | None, Any]:
    """The attention that takes the place of a model's own for a batch, with its mask; None: its own."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if batch.ends is not None and implementation(lm) not in FLASH and reads_packed_rows(lm):
        AttentionInterface.register(PACKED, attend_packed)
        return PACKED, batch.ends.expand(1, 1, batch.longest_sequence, -1)
    plain = batch.spans is None and not functional.free_to_read(batch.input_ids.device)
    if plain and _sees_all_before(lm):
        AttentionInterface.register(CAUSAL, sdpa_attention_forward)
        return CAUSAL, None
    return None, None


def _sees_all_before(lm: Any) -> bool:
    """Whether all layers have sdpa attention, to all earlier tokens, at the positions that they are given."""
    return (
        implementation(lm) == "sdpa"
        and "position_ids" in signature(lm.base_model.forward).parameters
        and not getattr(lm.config, "alibi", False)
        and not windowed(lm.config.get_text_config())
    )


def recomputes(lm: nn.Module) -> bool:
    """Whether a model computes activations again in backward: transformers switches all modules that can at once."""
    able = (module for module in lm.modules() if hasattr(module, "gradient_checkpointing"))
    return bool(getattr(next(able, None), "gradient_checkpointing", False))


def computes_in(model: nn.Module) -> torch.dtype:
    """The type of a model's products here and now: that of autocast, or of its weights."""
    return product_dtype(next(model.parameters()))


def product_dtype(of: Tensor) -> torch.dtype:
    """The type of products with a tensor: autocast's where it is on, else its own."""
    kind = of.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else of.dtype


def reads_packed_rows(lm: Any) -> bool:
    """Whether attention goes from sequence to sequence of a row; on a GPU that of PyTorch does in half precision."""
    if implementation(lm) in FLASH:
        return True
    if recomputes(lm):  # in backward, after `attending`, with the model's own attention
        return False
    kind = next(lm.parameters()).device.type
    half = computes_in(lm) in (torch.bfloat16, torch.float16)
    fits = half if kind in KERNEL_ON else kind == "cpu"
    return fits and _sees_all_before(lm)


def attend_packed(
    module: nn.Module,
    query_1HTD: Tensor,
    key_1KTD: Tensor,
    value_1KTD: Tensor,
    ends_11LS: Tensor,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each sequence of one row, as transformers calls it: `[1, T, H, D]`.

    H heads of queries, K of keys and values, D numbers each; `ends_11LS` has `Batch.ends` in its last dimension, and
    as many copies of them as the longest sequence may have tokens: a graph or compiled code is made for that number.
    """
    ends_S, longest = ends_11LS[0, 0, 0], ends_11LS.shape[2]
    dtype = product_dtype(query_1HTD)
    query, key, value = (one.squeeze(0).transpose(0, 1).to(dtype) for one in (query_1HTD, key_1KTD, value_1KTD))
    if query.device.type in KERNEL_ON:
        attention = torch.ops.aten._flash_attention_forward
        found = attention(query, key, value, ends_S, ends_S, longest, longest, dropout, True, False, scale=scaling)[0]
    else:
        found = _one_by_one(query, key, value, ends_S.tolist(), scaling, dropout)
    return found.unsqueeze(0), None


def _one_by_one(
    query_THD: Tensor, key_TKD: Tensor, value_TKD: Tensor, ends: list[int], scaling: float | None, dropout: float
) -> Tensor:
    """The same, one sequence after another."""
    parts = []
    for begin, end in pairwise(ends):
        query, key, value = (one[begin:end].transpose(0, 1).unsqueeze(0) for one in (query_THD, key_TKD, value_TKD))
        part = F.scaled_dot_product_attention(
            query, key, value, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=True
        )
        parts.append(part.squeeze(0).transpose(0, 1))
    return torch.cat(parts)


def attention_mask(lm: nn.Module, batch: Batch) -> Any:
    """The mask of a batch in the form that the model's attention takes.

    One sequence per row: the padding, `[R, T]`. Else a tree mask: `[R, 1, T, T]`, true where a token is seen (sdpa),
    0 there and the lowest number elsewhere (eager), or a BlockMask (FlexAttention). Attention over sequences of
    different length takes none: it finds where they begin from the positions.
    """
    if batch.spans is None:
        return batch.attention_mask
    kind = implementation(lm)
    if kind in FLASH:
        return None
    if kind == "flex_attention":
        return _block_mask(batch.spans)
    seen_R1TT = visible(batch.spans).unsqueeze(1)
    if kind == "sdpa":
        return seen_R1TT
    dtype = next(lm.parameters()).dtype
    return torch.zeros(seen_R1TT.shape, dtype=dtype, device=seen_R1TT.device).masked_fill_(
        ~seen_R1TT, torch.finfo(dtype).min
    )


def _block_mask(spans: Tensor) -> Any:
    """The tree mask of FlexAttention: blocks of which nothing is seen are not computed."""
    from torch.nn.attention.flex_attention import create_block_mask

    tree_RT, branch_RT = spans

    def seen(row: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        own = (branch_RT[row, key] == 0) | (branch_RT[row, key] == branch_RT[row, query])
        allowed: Tensor = (tree_RT[row, query] == tree_RT[row, key]) & own & (query >= key)
        return allowed

    rows, tokens = tree_RT.shape
    return create_block_mask(seen, rows, None, tokens, tokens, device=str(spans.device))
