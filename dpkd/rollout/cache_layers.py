"""Keys and values that are written in place: a new token costs no copy of the tokens before it.

Shapes: B rows, H heads, S columns in use, C columns of a buffer, T new tokens, D size of a head.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

# Columns that a buffer has beyond those in use when it is allocated.
ROOM = 64
# Up to so many numbers, concatenating them is as quick as writing into a view.
SMALL = 2**15


class PreallocatedLayer(DynamicLayer):
    """A `DynamicLayer` that appends in place: its keys and values `[B, H, S, D]` are views of buffers with room."""

    keys: Any
    values: Any

    def __init__(self, layer: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.lazy_initialization(layer.keys, layer.values)
        self.keys, self.values = layer.keys, layer.values
        self._buffers: tuple[Tensor, Tensor] | None = None
        self._written: Tensor | None = None  # the keys as `update` left them; others took their place: a new buffer

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append `[B, H, T, D]`; returns all keys and values."""
        if self.keys.numel() < SMALL:
            return super().update(key_states, value_states, *args, **kwargs)
        used, new = self.keys.shape[2], key_states.shape[2]
        if self._buffers is None or self._written is not self.keys or used + new > self._buffers[0].shape[2]:
            self._buffers = _with_room(self.keys, new), _with_room(self.values, new)
        keys, values = self._buffers
        keys.narrow(2, used, new).copy_(key_states)
        values.narrow(2, used, new).copy_(value_states)
        self.keys, self.values = keys.narrow(2, 0, used + new), values.narrow(2, 0, used + new)
        self._written = self.keys
        return self.keys, self.values


def _with_room(part: Tensor, new: int) -> Tensor:
    """A copy `[B, H, C, D]` of a part with columns for `new` tokens and some more."""
    rows, heads, used, size = part.shape
    buffer = part.new_empty(rows, heads, used + max(new, ROOM), size)
    buffer.narrow(2, 0, used).copy_(part)
    return buffer


def preallocated(cache: Cache) -> Cache:
    """The cache with its plain layers replaced by preallocated ones; other layers stay."""
    cache.layers = [PreallocatedLayer(layer) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def is_plain(cache: Any) -> bool:
    """Whether a cache is keys and values only, one column per token: no window, no other state."""
    return isinstance(cache, Cache) and all(type(layer) in (DynamicLayer, PreallocatedLayer) for layer in cache.layers)


class ColumnLayer(CacheLayerMixin):
    """Keys and values `[B, H, C, D]` of a fixed shape; a new token overwrites one column, the same in every row."""

    is_compileable = True
    keys: Any
    values: Any

    def __init__(self, keys: Tensor, values: Tensor, column: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.keys, self.values, self.column = keys, values, column
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing is left to initialize."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write `[B, H, 1, D]` into the current column; returns the whole buffers: the mask says what is in use."""
        self.keys.index_copy_(2, self.column, key_states)
        self.values.index_copy_(2, self.column, value_states)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns of the mask, and the first of them."""
        return self.keys.shape[2], 0

    def get_seq_length(self) -> int:
        """Columns before the newest token: a number of the shape, for the column itself is on the device."""
        return int(self.keys.shape[2]) - 1

    def get_max_length(self) -> int:
        """Columns that there are."""
        return int(self.keys.shape[2])


class CacheArena:
    """The keys and values of all rows of one model, allocated once; a decoding step sees a window of them."""

    def __init__(self, like: Any, rows: int, columns: int) -> None:
        def zeros(part: Tensor) -> Tensor:
            # Zeros: an unused column has weight 0 in the attention, and 0 times what memory held may be no number.
            return part.new_zeros(rows, part.shape[1], columns, part.shape[3])

        self._parts = [(zeros(layer.keys), zeros(layer.values)) for layer in like.layers]

    @property
    def bytes(self) -> int:
        """Memory that it takes."""
        return sum(part.nbytes for pair in self._parts for part in pair)

    def window(self, rows: int, columns: int, column: Tensor) -> Cache:
        """The first rows and columns as a cache whose newest token is written to `column` `[1]`."""
        return Cache(
            layers=[
                ColumnLayer(keys[:rows, :, :columns], values[:rows, :, :columns], column)
                for keys, values in self._parts
            ]
        )

    def put(self, prompts: Any, index_B: Tensor, slots_B: Tensor, end: int) -> None:
        """Copy prompt `index_B` of a cache into row `slots_B`, its newest token before column `end`."""
        for pair, layer in zip(self._parts, prompts.layers, strict=True):
            for own, new in zip(pair, (layer.keys, layer.values), strict=True):
                own[:, :, end - new.shape[2] : end].index_copy_(0, slots_B, new.index_select(0, index_B))

    def shift(self, columns: int, end: int) -> None:
        """Move what lies before column `end` to the left; the oldest columns are dropped."""
        for part in (part for pair in self._parts for part in pair):
            part[:, :, : end - columns] = part[:, :, columns:end].clone()

    def keep(self, slots_B: Tensor) -> None:
        """Move these rows to the top, in this order."""
        for part in (part for pair in self._parts for part in pair):
            part[: len(slots_B)] = part.index_select(0, slots_B)
