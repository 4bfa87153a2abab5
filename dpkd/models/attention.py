"""Which tokens a token sees, where a row holds more than one sequence: its own prompt, and its own response.

Shapes: R rows, T tokens of a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dpkd import functional

if TYPE_CHECKING:
    from dpkd.data.batches import Batch

# Attention over sequences of different length without padding.
VARLEN = ("flash_attention_2", "flash_attention_3", "flash_attention_4")


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


# transformers' name for its sdpa attention where nobody makes a mask for it.
CAUSAL = "dpkd_causal"


def windowed(config: Any) -> bool:
    """Whether a layer looks at a window, or is no attention at all."""
    kinds = getattr(config, "layer_types", None) or getattr(config, "attention_layers", None)
    if kinds:
        return any(kind not in ("full_attention", "global") for kind in kinds)
    return bool(getattr(config, "sliding_window", None)) and getattr(config, "use_sliding_window", True)


@contextmanager
def causal_alone(lm: Any, batch: Batch) -> Iterator[bool]:
    """Whether attention inside the block is causal and takes no mask; nothing changes where it must take one.

    In rows of one sequence, padded on the right as `collate` does, what is read sees no padding: it comes later.
    Without a mask attention has its fastest kernel, and nobody looks whether one is needed, for which on a GPU the host
    would wait.
    """
    may = (
        batch.spans is None
        and implementation(lm) == "sdpa"
        and not functional.free_to_read(batch.input_ids.device)
        and "position_ids" in signature(lm.base_model.forward).parameters
        and not getattr(lm.config, "alibi", False)
        and not windowed(lm.config.get_text_config())
    )
    if not may:
        yield False
        return
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    AttentionInterface.register(CAUSAL, sdpa_attention_forward)
    lm.config._attn_implementation = CAUSAL
    try:
        yield True
    finally:
        lm.config._attn_implementation = "sdpa"


def attention_mask(lm: nn.Module, batch: Batch) -> Any:
    """The mask of a batch in the form that the model's attention takes.

    One sequence per row: the padding, `[R, T]`. Else a tree mask: `[R, 1, T, T]`, true where a token is seen (sdpa),
    0 there and the lowest number elsewhere (eager), or a BlockMask (FlexAttention). Attention over sequences of
    different length takes none: it finds where they begin from the positions.
    """
    if batch.spans is None:
        return batch.attention_mask
    kind = implementation(lm)
    if kind in VARLEN:
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
