"""The rows that are being sampled together: started from prompts, stepped, and let go as they end.

Shapes: B rows in the batch, S columns of the KV caches, L the largest number of new tokens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dpkd.api import Sampled, SamplingSettings
from dpkd.errors import DpkdError
from dpkd.rollout.kv_cache import KVCacheModel
from dpkd.rollout.token_sampling import draw, precise_dtype

# Rows leave, and prompts enter, when this share of the batch has ended: both cost a copy of the cache.
TURNOVER = 0.25
# Tokens between two looks at which rows have ended, where looking makes an accelerator wait for the host.
CHECK_EVERY = 8


@dataclass(frozen=True)
class Request:
    """A prompt with the seeds of its responses; the responses are numbered from `first_row`."""

    first_row: int
    prompt: tuple[int, ...]
    seeds: tuple[int, ...]
    limit: int  # new tokens at most


@dataclass(frozen=True)
class DrawingPolicy:
    """How a token is drawn from logits, and which tokens end a response."""

    settings: SamplingSettings
    eos: Tensor
    mix: float = 0.0
    veto: int = 0


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

    def map(self, change: Callable[[Tensor], Tensor]) -> Rows:
        """Each column changed in one way."""
        return Rows(**{one.name: change(getattr(self, one.name)) for one in fields(self)})

    def select(self, index_B: Tensor) -> Rows:
        return self.map(lambda column: column.index_select(0, index_B))

    def join(self, other: Rows) -> Rows:
        names = [one.name for one in fields(self)]
        return Rows(**{name: torch.cat([getattr(self, name), getattr(other, name)]) for name in names})

    def put(self, other: Rows, slots_B: Tensor) -> None:
        """Overwrite some rows with those of another."""
        for one in fields(self):
            getattr(self, one.name).index_copy_(0, slots_B, getattr(other, one.name))

    def packed(self) -> Tensor:
        """The records `[3, B, L + 1]` as one tensor: ids, log-probs, behaviour log-probs."""
        return torch.stack([self.ids_BL.to(self.logps_BL.dtype), self.logps_BL, self.behaviour_BL])


def new_rows(group: Sequence[Request], length_B: Tensor, index_B: Tensor, columns: int, dtype: torch.dtype) -> Rows:
    """The rows of all responses to a group; `index_B` says whose prompt each has, `columns` how many tokens at most."""
    size, device = len(index_B), index_B.device
    # NumPy's generator: that of torch reads only the low 32 bits of a seed.
    seeds = [seed for request in group for seed in request.seeds]
    uniform_BL = torch.from_numpy(np.stack([np.random.default_rng(seed).random(columns) for seed in seeds]))
    numbers = [request.first_row + i for request in group for i in range(len(request.seeds))]
    zero_B = torch.zeros(size, dtype=torch.long, device=device)
    record_BL = torch.zeros(size, columns + 1, dtype=dtype, device=device)
    return Rows(
        number_B=torch.tensor(numbers, device=device),
        length_B=length_B,
        count_B=zero_B,
        limit_B=torch.tensor([request.limit for request in group], device=device)[index_B],
        token_B=zero_B.clone(),
        done_B=zero_B.bool(),
        truncated_B=zero_B.bool(),
        uniform_BL=F.pad(uniform_BL.to(device, precise_dtype(device)), (0, 1)),
        ids_BL=torch.zeros(size, columns + 1, dtype=torch.long, device=device),
        logps_BL=record_BL,
        behaviour_BL=record_BL.clone(),
    )


def record(rows: Rows, logits: Sequence[Tensor], policy: DrawingPolicy, static: bool = False) -> None:
    """Draw a token for each row from the logits `[B, V]` of the models, student first, and write it down in place.

    Raises DpkdError when two vocabularies differ.
    """
    student_BV, *teacher = logits
    if teacher and teacher[0].shape != student_BV.shape:
        raise DpkdError(
            f"the student draws from {student_BV.shape[1]} tokens and the teacher that is mixed in from "
            f"{teacher[0].shape[1]}: mixing needs one shared vocabulary"
        )
    column_B1 = rows.count_B.unsqueeze(1)
    drawn = draw(
        student_BV,
        rows.uniform_BL.gather(1, column_B1).squeeze(1),
        policy.settings,
        teacher_logits_BV=teacher[0] if teacher else None,
        mix=policy.mix,
        veto=policy.veto,
        static=static,
    )
    # A row that has ended has its count beyond its last token: what is written there is not read.
    rows.ids_BL.scatter_(1, column_B1, drawn.ids_B.unsqueeze(1))
    rows.logps_BL.scatter_(1, column_B1, drawn.logps_B.to(rows.logps_BL.dtype).unsqueeze(1))
    rows.behaviour_BL.scatter_(1, column_B1, drawn.behaviour_B.to(rows.logps_BL.dtype).unsqueeze(1))
    rows.token_B.copy_(drawn.ids_B)
    live_B = ~rows.done_B
    rows.count_B.add_(live_B)
    is_eos_B = (drawn.ids_B.unsqueeze(1) == policy.eos).any(1)
    full_B = rows.count_B >= rows.limit_B
    rows.truncated_B.logical_or_(live_B & full_B & ~is_eos_B)
    rows.done_B.logical_or_(is_eos_B | full_B)


def responses(
    numbers: Sequence[int], counts: Sequence[int], truncated: Sequence[bool], packed: Tensor
) -> dict[int, Sampled]:
    """The responses of rows that have ended, by number, from their records `[3, B, L + 1]` on the host.

    Raises DpkdError when a log-prob is not a number.
    """
    finished = {}
    for i, (number, count) in enumerate(zip(numbers, counts, strict=True)):
        ids, logps, behaviour = packed[:, i, :count].clone()
        if logps.isnan().any():
            raise DpkdError(
                "the model gives logits that are not numbers while sampling: its weights are damaged, or "
                "training has diverged (a lower learning rate, or clipping, may help)"
            )
        finished[number] = Sampled(tuple(ids.long().tolist()), logps, behaviour, bool(truncated[i]))
    return finished


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


def prefill(
    models: Sequence[KVCacheModel], group: Sequence[Request], policy: DrawingPolicy, pad_id: int, static: bool = False
) -> tuple[DecodingBatch, Tensor]:
    """Read prompts, and draw the first token of each response.

    The caches have a row per prompt, all else a row per response; the tensor `[B]` says whose response a row is.
    """
    device = models[0].device
    width = max(len(request.prompt) for request in group)
    ids = [[pad_id] * (width - len(request.prompt)) + list(request.prompt) for request in group]
    lengths = torch.tensor([len(request.prompt) for request in group], device=device)
    mask_BS = (torch.arange(width, device=device) >= (width - lengths).unsqueeze(1)).long()
    padded = any(len(request.prompt) != width for request in group)
    positions_BS = (mask_BS.cumsum(-1) - 1).clamp(min=0)
    cached_models = [model.empty() for model in models]
    ids_BS = torch.tensor(ids, device=device)
    logits = [model.feed(ids_BS, mask_BS if padded else None, positions_BS).to(device) for model in cached_models]
    repeats = [place for place, request in enumerate(group) for _ in request.seeds]
    prompt_B = torch.tensor(repeats, device=device)
    if len(repeats) > len(group):
        logits = [part.index_select(0, prompt_B) for part in logits]
    dtype = torch.float64 if logits[0].dtype == torch.float64 else torch.float32
    rows = new_rows(group, lengths[prompt_B], prompt_B, policy.settings.max_new_tokens, dtype)
    record(rows, logits, policy, static)
    return DecodingBatch(cached_models, rows, mask_BS[prompt_B], padded), prompt_B


class ContinuousBatcher:
    """Decodes with caches that grow: for every model, on every device."""

    def __init__(self, models: Sequence[KVCacheModel], policy: DrawingPolicy, pad_id: int) -> None:
        self._models = models
        self._policy = policy
        self._pad_id = pad_id
        self._check_every = 1 if models[0].device.type == "cpu" else CHECK_EVERY

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
                for _ in range(self._check_every):
                    self._step(batch)
                batch.ended = int(batch.rows.done_B.sum())
            if batch is not None and batch.ended >= max(1, TURNOVER * batch.size):
                batch, finished = _settled(batch)
                yield finished

    def _next_group(self, waiting: deque[Request], batch: DecodingBatch | None) -> list[Request]:
        """The prompts that enter now: those that fill the batch, when enough of it is free."""
        if not waiting:
            return []
        limit = self._policy.settings.batch_size
        room = limit - (batch.size if batch is not None else 0)
        if batch is not None:
            wanted = max(TURNOVER * limit, len(waiting[0].seeds))
            if room < wanted or not all(cached_model.can_join for cached_model in batch.cached_models):
                return []
        return take_group(waiting, room)

    def _start(self, group: list[Request]) -> DecodingBatch:
        batch, prompt_B = prefill(self._models, group, self._policy, self._pad_id)
        if len(prompt_B) > len(group):
            for cached_model in batch.cached_models:
                cached_model.select(prompt_B)
        batch.ended = int(batch.rows.done_B.sum())
        return batch

    def _step(self, batch: DecodingBatch) -> None:
        rows = batch.rows
        batch.mask_BS = F.pad(batch.mask_BS, (0, 1), value=1)
        mask_BS = batch.mask_BS if batch.padded else None
        token_B1, position_B1 = rows.token_B.unsqueeze(1), rows.length_B.unsqueeze(1)
        device = self._models[0].device
        logits = [model.feed(token_B1, mask_BS, position_B1).to(device) for model in batch.cached_models]
        # A row that has ended reads on at its last position until it leaves; nobody looks at it.
        rows.length_B.add_(~rows.done_B)
        record(rows, logits, self._policy)


def take_group(waiting: deque[Request], room: int) -> list[Request]:
    """The next prompts whose responses fit into so many rows; the first in any case."""
    group = [waiting.popleft()]
    room -= len(group[0].seeds)
    while waiting and len(waiting[0].seeds) <= room:
        room -= len(waiting[0].seeds)
        group.append(waiting.popleft())
    return group


def _joined(batch: DecodingBatch, entering: DecodingBatch) -> DecodingBatch:
    for own, new in zip(batch.cached_models, entering.cached_models, strict=True):
        own.join(new)
    columns = max(batch.mask_BS.shape[1], entering.mask_BS.shape[1])
    masks = [F.pad(part.mask_BS, (columns - part.mask_BS.shape[1], 0)) for part in (batch, entering)]
    rows = batch.rows.join(entering.rows)
    return DecodingBatch(batch.cached_models, rows, torch.cat(masks), True, batch.ended + entering.ended)


def _settled(batch: DecodingBatch) -> tuple[DecodingBatch | None, dict[int, Sampled]]:
    """What is left of a batch when the rows that have ended leave it, and these rows."""
    done_B = batch.rows.done_B
    gone = batch.rows.select(done_B.nonzero().squeeze(1))
    counts, truncated = gone.count_B.tolist(), gone.truncated_B.tolist()
    finished = responses(gone.number_B.tolist(), counts, truncated, gone.packed().cpu())
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
