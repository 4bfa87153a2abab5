"""Decoding with static shapes: the rows of a batch are slots, and every step writes one column of all of them.

A step reads and writes tensors that were allocated once and asks the host for nothing, so that on CUDA it is captured
in a graph, one for each window of rows and columns. The host looks at the rows every few tokens: those that have ended
leave, and prompts take their slots. Shapes: B rows of the window, R slots, C columns of the caches, L new tokens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dpkd.api import Sampled
from dpkd.models.cuda_graphs import NotStatic, Recorder, Replay
from dpkd.rollout.continuous_batching import (
    CHECK_EVERY,
    DecodingBatch,
    DrawingPolicy,
    Request,
    Rows,
    prefill,
    record,
    responses,
    take_group,
)
from dpkd.rollout.kv_cache import KVCacheModel

# Below so many rows a decoding step is bound by the weights that it reads: a smaller window gains nothing.
SMALLEST_WINDOW = 32
# A window of fewer rows is made when so small a share of them is left: capturing a step costs as much as many steps.
SHRINK = 0.25


def row_bucket(rows: int) -> int:
    """Slots for so many rows: a power of two, or from 64 a multiple of 64."""
    return 1 << (rows - 1).bit_length() if rows <= 64 else -(-rows // 64) * 64


def column_bucket(columns: int) -> int:
    """Columns of the caches: multiples of 64 (kernels want aligned masks), beyond 256 at most a quarter too large."""
    step = max(64, 1 << max(0, (columns - 1).bit_length() - 3))
    return -(-columns // step) * step


def decode_step(
    models: Sequence[KVCacheModel],
    caches: Sequence[Any],
    rows: Rows,
    seen_B11C: Tensor,
    column: Tensor,
    policy: DrawingPolicy,
) -> None:
    """Read the last drawn token of each row into one column `[1]` of the caches, and draw the next; all in place."""
    seen_B11C.index_fill_(3, column, True)
    token_B1, position_B1 = rows.token_B.unsqueeze(1), rows.length_B.unsqueeze(1)
    logits = [model.step(cache, token_B1, seen_B11C, position_B1) for model, cache in zip(models, caches, strict=True)]
    rows.length_B.add_(~rows.done_B)
    column.add_(1)
    record(rows, logits, policy, static=True)


class DecodingState:
    """Everything on the device that a step reads or writes: caches, rows, mask; and the steps of its windows."""

    def __init__(
        self,
        models: Sequence[KVCacheModel],
        policy: DrawingPolicy,
        like: Sequence[Any],
        like_rows: Rows,
        slots: int,
        columns: int,
    ) -> None:
        from dpkd.rollout.cache_layers import CacheArena

        self.slots, self.columns, self.tokens = slots, columns, like_rows.ids_BL.shape[1] - 1
        self.device, self.policy, self.models = models[0].device, policy, models
        self.dtypes = [part.dtype for cache in like for part in (cache.layers[0].keys, like_rows.logps_BL)]
        self.arenas = [CacheArena(cache, slots, columns) for cache in like]
        self.rows = like_rows.map(lambda part: part.new_zeros(slots, *part.shape[1:]))
        self.seen_R11C = torch.zeros(slots, 1, 1, columns, dtype=torch.bool, device=self.device)
        self.column = torch.zeros(1, dtype=torch.long, device=self.device)
        self._steps: dict[tuple[int, int], Replay] = {}
        self._recorder = Recorder(self.device)

    @property
    def bytes(self) -> int:
        """Memory of the caches."""
        return sum(arena.bytes for arena in self.arenas)

    def fits(self, policy: DrawingPolicy, like: Sequence[Any], like_rows: Rows, slots: int, columns: int) -> bool:
        """Whether other responses can be drawn in it."""
        return (
            slots <= self.slots
            and columns <= self.columns
            and like_rows.ids_BL.shape[1] - 1 == self.tokens
            and _key(policy) == _key(self.policy)
            and self.dtypes == [part.dtype for cache in like for part in (cache.layers[0].keys, like_rows.logps_BL)]
        )

    def window(self, columns: int) -> int:
        """Columns of the window for so many: a power of two, or all that there are, for each window is captured."""
        # More columns than there are keep their number: rows are moved before a window is made of them.
        return max(columns, min(max(64, 1 << (columns - 1).bit_length()), self.columns))

    def step(self, rows: int, columns: int) -> Replay:
        """The step of a window."""
        if (rows, columns) not in self._steps:
            caches = [arena.window(rows, columns, self.column) for arena in self.arenas]
            window = self.rows.map(lambda part: part[:rows])
            seen_B11C = self.seen_R11C[:rows, :, :, :columns]
            self._steps[rows, columns] = Replay(
                lambda: decode_step(self.models, caches, window, seen_B11C, self.column, self.policy), self._recorder
            )
        return self._steps[rows, columns]

    def put(self, read: DecodingBatch, prompt_B: Tensor, slots_B: Tensor, end: int) -> None:
        """Prompts that were read take some slots, their last token before column `end`."""
        for arena, model in zip(self.arenas, read.cached_models, strict=True):
            arena.put(model.cache, prompt_B, slots_B, end)
        self.rows.put(read.rows, slots_B)
        columns = torch.arange(self.columns, device=self.device)
        seen_BC = (columns < end) & (columns >= end - read.rows.length_B.unsqueeze(1))
        self.seen_R11C.index_copy_(0, slots_B, seen_BC[:, None, None, :])
        self.column.fill_(end)

    def shift(self, spare: int, end: int) -> None:
        """Drop the oldest columns of all rows."""
        for arena in self.arenas:
            arena.shift(spare, end)
        self.seen_R11C[..., : end - spare] = self.seen_R11C[..., spare:end].clone()
        self.seen_R11C[..., end - spare :] = False
        self.column.fill_(end - spare)

    def keep(self, slots_B: Tensor) -> None:
        """Move these rows to the top."""
        for arena in self.arenas:
            arena.keep(slots_B)
        self.rows.map(lambda part: part[: len(slots_B)].copy_(part.index_select(0, slots_B)))
        self.seen_R11C[: len(slots_B)] = self.seen_R11C.index_select(0, slots_B)
        self.rows.done_B[len(slots_B) :] = True


def _key(policy: DrawingPolicy) -> tuple[Any, ...]:
    return policy.settings, policy.mix, policy.veto, tuple(policy.eos.shape)


@dataclass
class Slot:
    """What the host knows of a row."""

    number: int
    prompt: int  # its tokens
    limit: int
    count: int = 1

    @property
    def cached(self) -> int:
        """Tokens in the caches: the last one drawn is not yet."""
        return self.prompt + self.count - 1


class StaticBatcher:
    """Continuous batching over slots. `state` is kept from one call of `run` to the next where it fits."""

    def __init__(self, models: Sequence[KVCacheModel], pad_id: int) -> None:
        self._models, self._pad_id = models, pad_id
        self._device = models[0].device
        self._addresses: list[int] = []
        self.state: DecodingState | None = None

    def run(self, requests: Sequence[Request], policy: DrawingPolicy) -> Iterator[dict[int, Sampled]]:
        """Responses by number, as they finish; longest prompts first.

        Raises NotStatic when the models do not allow it, before the first response.
        """
        if any(model.device != self._device for model in self._models):
            raise NotStatic("the models are on different devices")
        # A graph reads the weights where they were when it was captured.
        addresses = [part for model in self._models for part in model.addresses()]
        if addresses != self._addresses:
            self.state, self._addresses = None, addresses
            self._models = [model.empty() for model in self._models]
        for model in self._models:
            model.align_head()
        waiting = deque(sorted(requests, key=lambda request: -len(request.prompt)))
        rows = row_bucket(min(policy.settings.batch_size, sum(len(request.seeds) for request in requests)))
        longest = max(len(request.prompt) + request.limit for request in requests)
        slots: list[Slot | None] = [None] * rows
        column = 0
        leaving: Callable[[], dict[int, Sampled]] | None = None
        while waiting or any(slots):
            free = [place for place, slot in enumerate(slots) if slot is None]
            # Sorted by length: no prompt is longer than the rows that are still being written.
            room = min(len(free), policy.settings.batch_size - (len(slots) - len(free)))
            if waiting and len(waiting[0].seeds) <= room:
                group = take_group(waiting, room)
                column = self._admit(group, policy, slots, free, column, rows, longest)
            state = self._state
            steps = min(CHECK_EVERY, max(slot.limit - slot.count for slot in slots if slot))
            slots, column = self._fitted(slots, column, steps, shrink=not waiting)
            step = state.step(len(slots), state.window(column + steps))
            for _ in range(steps):
                step()
            column += steps
            ended, status = self._look(slots)  # waits for the device: what was leaving has arrived
            if leaving is not None:
                yield leaving()
            leaving = self._leave(slots, ended, status)
        if leaving is not None:
            if self._device.type == "cuda":
                torch.cuda.current_stream(self._device).synchronize()
            yield leaving()

    @property
    def _state(self) -> DecodingState:
        assert self.state is not None  # the first group of prompts made it
        return self.state

    def _admit(
        self,
        group: list[Request],
        policy: DrawingPolicy,
        slots: list[Slot | None],
        free: list[int],
        column: int,
        rows: int,
        longest: int,
    ) -> int:
        """Read prompts into free slots; returns the column that comes next."""
        read, prompt_B = prefill(self._models, group, policy, self._pad_id, static=True)
        caches = [model.cache for model in read.cached_models]
        if not any(slots):
            refusals = [model.static_refusal for model in read.cached_models]
            for refusal in filter(None, refusals):
                raise NotStatic(refusal)
            columns = column_bucket(longest + CHECK_EVERY)
            if self.state is None or not self.state.fits(policy, caches, read.rows, rows, columns):
                self.state = None  # its memory first
                self.state = DecodingState(self._models, policy, caches, read.rows, rows, columns)
            self.state.rows.done_B.fill_(True)
            self.state.policy.eos.copy_(policy.eos)
            column = len(group[0].prompt)
        places = free[: len(prompt_B)]
        self._state.put(read, prompt_B, _on(self._device, places), column)
        new = [(request.first_row + i, request) for request in group for i in range(len(request.seeds))]
        for place, (number, request) in zip(places, new, strict=True):
            slots[place] = Slot(number, len(request.prompt), request.limit)
        return column

    def _fitted(self, slots: list[Slot | None], column: int, steps: int, shrink: bool) -> tuple[list[Slot | None], int]:
        """Rows and columns moved together, where that makes room or a smaller window."""
        state, live = self._state, [place for place, slot in enumerate(slots) if slot]
        smaller = max(SMALLEST_WINDOW, row_bucket(len(live)))
        if shrink and smaller <= SHRINK * len(slots):
            state.keep(_on(self._device, live))
            slots = [slots[place] for place in live] + [None] * (smaller - len(live))
        spare = column - max(slot.cached for slot in slots if slot)
        if spare > 0 and state.window(column - spare + steps) < state.window(column + steps):
            state.shift(spare, column)
            column -= spare
        return slots, column

    def _look(self, slots: list[Slot | None]) -> tuple[list[int], list[list[int]]]:
        """The slots whose rows have ended, and counts and truncations of all: the one wait for the device."""
        rows = self._state.rows
        columns = [part[: len(slots)].long() for part in (rows.count_B, rows.truncated_B, rows.done_B)]
        status: list[list[int]] = torch.stack(columns).tolist()
        for slot, count in zip(slots, status[0], strict=True):
            if slot is not None:
                slot.count = count
        return [place for place, slot in enumerate(slots) if slot and status[2][place]], status

    def _leave(
        self, slots: list[Slot | None], ended: list[int], status: list[list[int]]
    ) -> Callable[[], dict[int, Sampled]] | None:
        """Free the slots of rows that have ended; what gives their records, which come while the next steps run."""
        if not ended:
            return None
        packed = self._state.rows.select(_on(self._device, ended)).packed().to("cpu", non_blocking=True)
        numbers = [slot.number for place in ended if (slot := slots[place])]
        for place in ended:
            slots[place] = None
        return partial(responses, numbers, [status[0][i] for i in ended], [bool(status[1][i]) for i in ended], packed)


def _on(device: torch.device, values: list[int]) -> Tensor:
    """Whole numbers on a device, without waiting for it."""
    numbers = torch.tensor(values)
    return numbers.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else numbers
