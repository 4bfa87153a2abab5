"""The rows that are being sampled together: started from prompts, stepped, and let go as they end.

Shapes: B rows in the batch, S columns of the KV caches, L the largest number of new tokens.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dpkd.api import Sampled
from dpkd.errors import DpkdError
from dpkd.rollout.base import SamplingSettings
from dpkd.rollout.kv_cache import KVCacheModel
from dpkd.rollout.token_sampling import draw, precise_dtype

# Rows leave, and prompts enter, when this share of the batch has ended: both cost a copy of the cache.
TURNOVER = 0.25


@dataclass(frozen=True)
class Request:
    """A prompt with the seeds of its responses; the responses are numbered from `first_row`."""

    first_row: int
    prompt: tuple[int, ...]
    seeds: tuple[int, ...]
    limit: int  # new tokens at most


@dataclass
class Rows:
    """What is known of each row of the batch, B first. Column L of the records is a dust bin."""

    number_B: Tensor
    length_B: Tensor  # tokens in the cache
    count_B: Tensor  # tokens drawn
    limit_B: Tensor
    token_B: Tensor  # the last one drawn, not yet in the cache
    done_B: Tensor
    truncated_B: Tensor
    uniform_BL: Tensor
    ids_BL: Tensor
    logps_BL: Tensor
    behaviour_BL: Tensor

    def select(self, index_B: Tensor) -> Rows:
        return Rows(**{one.name: getattr(self, one.name).index_select(0, index_B) for one in fields(self)})

    def join(self, other: Rows) -> Rows:
        names = [one.name for one in fields(self)]
        return Rows(**{name: torch.cat([getattr(self, name), getattr(other, name)]) for name in names})


@dataclass
class DecodingBatch:
    """Rows, the caches of the models over them, and which columns of the caches they fill."""

    cached_models: list[KVCacheModel]
    rows: Rows
    mask_BS: Tensor
    padded: bool
    ended: int = 0

    @property
    def size(self) -> int:
        return self.mask_BS.shape[0]


class ContinuousBatcher:
    """How to sample: the models (student first), the settings and the ends."""

    def __init__(
        self,
        cached_models: Sequence[KVCacheModel],
        settings: SamplingSettings,
        eos_ids: Collection[int],
        pad_id: int,
        mix: float,
        veto: int = 0,
    ) -> None:
        self._streams = cached_models
        self._settings = settings
        self._device = cached_models[0].device
        self._eos = torch.tensor(sorted(eos_ids), dtype=torch.long, device=self._device)
        self._pad_id = pad_id
        self._mix, self._veto = mix, veto

    def run(self, requests: Sequence[Request]) -> Iterator[dict[int, Sampled]]:
        """Responses by number, as they finish; longest prompts first: a lack of memory shows at once."""
        waiting = deque(sorted(requests, key=lambda request: -len(request.prompt)))
        batch: DecodingBatch | None = None
        while waiting or batch is not None:
            group = self._next_group(waiting, batch)
            if group:
                entering = self._start(group)
                batch = entering if batch is None else _joined(batch, entering)
            elif batch is not None:
                self._step(batch)
            if batch is not None and batch.ended >= max(1, TURNOVER * batch.size):
                batch, finished = _settled(batch)
                yield finished

    def _next_group(self, waiting: deque[Request], batch: DecodingBatch | None) -> list[Request]:
        """The prompts that enter now: those that fill the batch, when enough of it is free."""
        if not waiting:
            return []
        room = self._settings.batch_size - (batch.size if batch is not None else 0)
        if batch is not None:
            wanted = max(TURNOVER * self._settings.batch_size, len(waiting[0].seeds))
            if room < wanted or not all(cached_model.can_join for cached_model in batch.cached_models):
                return []
        group = [waiting.popleft()]
        room -= len(group[0].seeds)
        while waiting and len(waiting[0].seeds) <= room:
            room -= len(waiting[0].seeds)
            group.append(waiting.popleft())
        return group

    def _start(self, group: list[Request]) -> DecodingBatch:
        """Read the prompts, once for all responses of a prompt, and draw the first tokens."""
        width = max(len(request.prompt) for request in group)
        ids = [[self._pad_id] * (width - len(request.prompt)) + list(request.prompt) for request in group]
        ids_BS = torch.tensor(ids, device=self._device)
        lengths = torch.tensor([len(request.prompt) for request in group], device=self._device)
        mask_BS = (torch.arange(width, device=self._device) >= (width - lengths).unsqueeze(1)).long()
        padded = any(len(request.prompt) != width for request in group)
        positions_BS = (mask_BS.cumsum(-1) - 1).clamp(min=0)

        cached_models = [cached_model.empty() for cached_model in self._streams]
        logits = [
            cached_model.feed(ids_BS, mask_BS if padded else None, positions_BS) for cached_model in cached_models
        ]
        repeats = torch.tensor([len(request.seeds) for request in group], device=self._device)
        index_B = torch.arange(len(group), device=self._device).repeat_interleave(repeats)
        if len(index_B) > len(group):
            for cached_model in cached_models:
                cached_model.select(index_B)
            logits = [part.index_select(0, index_B.to(part.device)) for part in logits]
        batch = DecodingBatch(cached_models, self._new_rows(group, lengths[index_B], index_B), mask_BS[index_B], padded)
        self._record(batch, logits)
        return batch

    def _new_rows(self, group: list[Request], length_B: Tensor, index_B: Tensor) -> Rows:
        size, longest, device = len(index_B), self._settings.max_new_tokens, self._device
        # NumPy's generator: that of torch reads only the low 32 bits of a seed.
        seeds = [seed for request in group for seed in request.seeds]
        uniform_BL = torch.from_numpy(np.stack([np.random.default_rng(seed).random(longest) for seed in seeds]))
        numbers = [request.first_row + i for request in group for i in range(len(request.seeds))]
        zero_B = torch.zeros(size, dtype=torch.long, device=device)
        record_BL = torch.zeros(size, longest + 1, dtype=precise_dtype(device), device=device)
        return Rows(
            number_B=torch.tensor(numbers, device=device),
            length_B=length_B,
            count_B=zero_B,
            limit_B=torch.tensor([request.limit for request in group], device=device)[index_B],
            token_B=zero_B.clone(),
            done_B=zero_B.bool(),
            truncated_B=zero_B.bool(),
            uniform_BL=F.pad(uniform_BL.to(device, record_BL.dtype), (0, 1)),
            ids_BL=torch.zeros(size, longest + 1, dtype=torch.long, device=device),
            logps_BL=record_BL,
            behaviour_BL=record_BL.clone(),
        )

    def _step(self, batch: DecodingBatch) -> None:
        """Read the last drawn tokens and draw the next."""
        rows = batch.rows
        batch.mask_BS = F.pad(batch.mask_BS, (0, 1), value=1)
        mask_BS = batch.mask_BS if batch.padded else None
        token_B1, position_B1 = rows.token_B.unsqueeze(1), rows.length_B.unsqueeze(1)
        logits = [cached_model.feed(token_B1, mask_BS, position_B1) for cached_model in batch.cached_models]
        # A row that has ended reads on at its last position until it leaves; nobody looks at it.
        rows.length_B = rows.length_B + (~rows.done_B)
        self._record(batch, logits)

    def _record(self, batch: DecodingBatch, logits: list[Tensor]) -> None:
        """Draw a token for each row from the logits of the models and write it down."""
        rows = batch.rows
        student_BV, *teacher = (part.to(self._device) for part in logits)
        if teacher and teacher[0].shape != student_BV.shape:
            raise DpkdError(
                f"the student draws from {student_BV.shape[1]} tokens and the teacher that is mixed in from "
                f"{teacher[0].shape[1]}: mixing needs one shared vocabulary"
            )
        column_B1 = rows.count_B.unsqueeze(1)
        uniform_B = rows.uniform_BL.gather(1, column_B1).squeeze(1)
        teacher_BV = teacher[0] if teacher else None
        drawn = draw(
            student_BV, uniform_B, self._settings, teacher_logits_BV=teacher_BV, mix=self._mix, veto=self._veto
        )
        # A row that has ended has its count beyond its last token: what is written there is not read.
        rows.ids_BL.scatter_(1, column_B1, drawn.ids_B.unsqueeze(1))
        rows.logps_BL.scatter_(1, column_B1, drawn.logps_B.to(rows.logps_BL.dtype).unsqueeze(1))
        rows.behaviour_BL.scatter_(1, column_B1, drawn.behaviour_B.to(rows.logps_BL.dtype).unsqueeze(1))
        rows.token_B = drawn.ids_B
        rows.count_B = rows.count_B + (~rows.done_B)
        is_eos_B = (drawn.ids_B.unsqueeze(1) == self._eos).any(1)
        full_B = rows.count_B >= rows.limit_B
        rows.truncated_B = rows.truncated_B | (~rows.done_B & full_B & ~is_eos_B)
        rows.done_B = rows.done_B | is_eos_B | full_B
        batch.ended = int(rows.done_B.sum())


def _joined(batch: DecodingBatch, entering: DecodingBatch) -> DecodingBatch:
    """Both groups of rows as one batch."""
    for own, new in zip(batch.cached_models, entering.cached_models, strict=True):
        own.join(new)
    columns = max(batch.mask_BS.shape[1], entering.mask_BS.shape[1])
    masks = [F.pad(part.mask_BS, (columns - part.mask_BS.shape[1], 0)) for part in (batch, entering)]
    rows = batch.rows.join(entering.rows)
    return DecodingBatch(batch.cached_models, rows, torch.cat(masks), True, batch.ended + entering.ended)


def _settled(batch: DecodingBatch) -> tuple[DecodingBatch | None, dict[int, Sampled]]:
    """What is left of a batch when the rows that have ended leave it, and these rows."""
    done_B = batch.rows.done_B
    finished = _finished(batch.rows.select(done_B.nonzero().squeeze(1)))
    index_B = (~done_B).nonzero().squeeze(1)
    if len(index_B) == 0:
        return None, finished
    rows = batch.rows.select(index_B)
    mask_BS = batch.mask_BS.index_select(0, index_B)
    for cached_model in batch.cached_models:
        cached_model.select(index_B)
    longest, shortest = int(rows.length_B.max()), int(rows.length_B.min())
    spare = mask_BS.shape[1] - longest
    if spare > 0 and all(cached_model.can_join for cached_model in batch.cached_models):
        mask_BS = mask_BS[:, spare:]
        for cached_model in batch.cached_models:
            cached_model.trim(spare)
    padded = shortest < mask_BS.shape[1]
    return DecodingBatch(batch.cached_models, rows, mask_BS, padded), finished


def _finished(rows: Rows) -> dict[int, Sampled]:
    """The responses of rows that have ended, by number."""
    numbers, counts, truncated = rows.number_B.tolist(), rows.count_B.tolist(), rows.truncated_B.tolist()
    records_BL = rows.ids_BL.tolist(), rows.logps_BL.tolist(), rows.behaviour_BL.tolist()
    finished = {}
    for i, (number, count) in enumerate(zip(numbers, counts, strict=True)):
        ids, logps, behaviour = (tuple(record_BL[i][:count]) for record_BL in records_BL)
        if any(math.isnan(value) for value in logps):
            raise DpkdError(
                "the model gives logits that are not numbers while sampling: its weights are damaged, or "
                "training has diverged (a lower learning rate, or clipping, may help)"
            )
        finished[number] = Sampled(ids, logps, behaviour, truncated[i])
    return finished
