"""A causal LM with the KV cache of the rows that are being written.

Shapes: B rows, T new tokens per row, S columns of the cache. Rows are right-aligned: the newest token of each
row stands in the last column, padding to the left of the first.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpkd.functional import at_least_float32, gather_logps, log_softmax
from dpkd.models.attention import implementation
from dpkd.models.head import Head, causal_lm, head_of


class KVCacheModel:
    """One model and its cache. `feed` adds tokens to each row; `select`, `trim`, `join` change the rows."""

    def __init__(self, model: nn.Module, vocabulary: int | None) -> None:
        self._model = model
        self._vocabulary = vocabulary
        parameters = inspect.signature(causal_lm(model).forward).parameters
        self._takes_positions = "position_ids" in parameters  # models with ALiBi have none
        self._head_on_last = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
        weight = causal_lm(model).get_input_embeddings().weight
        self.device: torch.device = weight.device
        self.dtype: torch.dtype = weight.dtype
        self.cache: Any = None
        self._aligned: Head | None = None

    def empty(self) -> KVCacheModel:
        """The same model without rows."""
        return KVCacheModel(self._model, self._vocabulary)

    def feed(self, ids_BT: Tensor, mask_BS: Tensor | None, positions_BT: Tensor) -> Tensor:
        """Read T tokens per row; the logits `[B, V]` of what follows. The mask covers the new columns too."""
        from dpkd.rollout.cache_layers import preallocated

        mask_BS = None if mask_BS is None else mask_BS.to(self.device)
        is_new = self.cache is None
        logits_BV, self.cache = self._forward(ids_BT.to(self.device), mask_BS, positions_BT.to(self.device), self.cache)
        if is_new and self.can_join:
            self.cache = preallocated(self.cache)
        return logits_BV

    def step(self, cache: Any, ids_B1: Tensor, seen_B11C: Tensor, positions_B1: Tensor) -> Tensor:
        """Read one token per row into a cache of fixed shape; the logits `[B, V]`. Nothing is read by the host."""
        # Additive: sdpa would make it of booleans once in every layer.
        bias_B11C = torch.zeros_like(seen_B11C, dtype=self.dtype)
        bias_B11C.masked_fill_(~seen_B11C, torch.finfo(self.dtype).min)
        if self._aligned is None:
            return self._forward(ids_B1, bias_B11C, positions_B1, cache)[0]
        output = self._run(causal_lm(self._model).base_model, ids_B1, bias_B11C, positions_B1, cache)
        raw_BV = self._aligned.raw(output.last_hidden_state[:, -1])
        return self._aligned.rule(raw_BV)[:, : self._vocabulary]

    def align_head(self) -> None:
        """Let `step` have a copy of a head whose number of tokens is slow here; ask again when weights have changed."""
        if type(causal_lm(self._model).get_output_embeddings()) is not nn.Linear:  # packed, or with adapters
            return
        head = head_of(self._model)
        if self._aligned is not None:
            self._aligned.refill(head)
        elif (cast := head.cast(self.dtype)).vocabulary is not None:
            self._aligned = cast

    def logps(self, prompt: Sequence[int], response: Sequence[int]) -> Tensor:
        """Log-prob `[T]` of each token of a response, on the host, by one forward without a cache."""
        ids_1T = torch.tensor([[*prompt, *response]], device=self.device)
        positions = {"position_ids": torch.arange(ids_1T.shape[1], device=self.device).unsqueeze(0)}
        output = self._model(input_ids=ids_1T, use_cache=False, **(positions if self._takes_positions else {}))
        logits_TV = at_least_float32(output.logits[0, len(prompt) - 1 : -1, : self._vocabulary])
        return gather_logps(log_softmax(logits_TV), ids_1T[0, len(prompt) :]).cpu()

    def _forward(self, ids: Tensor, mask: Tensor | None, positions: Tensor, cache: Any) -> tuple[Tensor, Any]:
        output = self._run(self._model, ids, mask, positions, cache, **self._head_on_last)
        return output.logits[:, -1, : self._vocabulary], output.past_key_values

    def _run(
        self, model: nn.Module, ids: Tensor, mask: Tensor | None, positions: Tensor, cache: Any, **how: Any
    ) -> Any:
        """What the model, or its backbone, gives for further tokens."""
        if self._takes_positions:
            how["position_ids"] = positions
        return model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **how)

    def select(self, index_B: Tensor) -> None:
        """Keep the rows of an index, in its order; an index may repeat a row."""
        self.cache.reorder_cache(index_B.to(self.device))

    @property
    def can_join(self) -> bool:
        """Whether the cache is plain keys and values, one column per token: no window, no other state."""
        from dpkd.rollout.cache_layers import is_plain

        return is_plain(self.cache)

    def addresses(self) -> list[int]:
        """Where the weights are in memory."""
        return [part.data_ptr() for part in (*self._model.parameters(), *self._model.buffers())]

    @property
    def static_refusal(self) -> str | None:
        """Why this model cannot be decoded with static shapes, or None; ask it after a prompt was read."""
        kind = implementation(causal_lm(self._model))
        if not self._takes_positions:
            return "the model takes no positions"
        if kind not in ("sdpa", "eager"):
            return f"its attention is {kind}"
        return None if self.can_join else "its cache is more than keys and values (a sliding window, other state)"

    def trim(self, columns: int) -> None:
        """Drop the oldest columns: padding in every row. Needs `can_join`."""
        for layer in self.cache.layers:
            layer.keys, layer.values = layer.keys[:, :, columns:], layer.values[:, :, columns:]

    def join(self, other: KVCacheModel) -> None:
        """Add the rows of another cached_model of the same model below the own rows. Needs `can_join`."""
        for own, new in zip(self.cache.layers, other.cache.layers, strict=True):
            own.keys, own.values = _stacked(own.keys, new.keys), _stacked(own.values, new.values)


def _stacked(first: Tensor, second: Tensor) -> Tensor:
    """Keys or values `[B, heads, S, D]` of two caches, the shorter one padded on the left."""
    columns = max(first.shape[2], second.shape[2])
    return torch.cat([F.pad(part, (0, 0, columns - part.shape[2], 0)) for part in (first, second)])
