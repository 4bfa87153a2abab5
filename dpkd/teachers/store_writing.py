"""Writing a store: the teacher reads fixed text once, so that training needs it no more."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from dpkd.api.teachers import Teacher, Wants
from dpkd.data.batches import Batch, TokenSequence, collate, micro_batches
from dpkd.functional import gather_logps, log_softmax
from dpkd.locks import folder_lock
from dpkd.models.chunked import chunk_rows, chunks
from dpkd.teachers.store_manifest import Manifest, write_manifest
from dpkd.teachers.store_shards import Shards, sequence_key

SHARD_TOKENS = 100_000
DTYPES = {"float16": torch.float16, "float32": torch.float32}


@torch.no_grad()
def write_store(
    folder: Path,
    teacher: Teacher,
    sequences: Sequence[TokenSequence],
    manifest: Manifest,
    *,
    pad_id: int,
    batch_size: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Write what is missing of the sequences into a store; returns how many were written now.

    Raises DpkdError when the folder holds numbers of another kind, or while another process writes to it.
    """
    with folder_lock(folder):
        write_manifest(folder, manifest)
        return _write_missing(Shards(folder), teacher, sequences, manifest, pad_id, batch_size, progress)


def _write_missing(
    shards: Shards,
    teacher: Teacher,
    sequences: Sequence[TokenSequence],
    manifest: Manifest,
    pad_id: int,
    batch_size: int,
    progress: Callable[[int, int], None] | None,
) -> int:
    distinct = {_key(s): s for s in sequences}
    todo = [s for key, s in distinct.items() if key not in shards]
    waiting: dict[str, dict[str, Tensor]] = {}
    done = tokens = 0
    teacher.expect(todo, Wants(64, logits=True))
    for group in micro_batches([len(s.prompt_ids) + len(s.response_ids) for s in todo], batch_size):
        members = [todo[i] for i in group]
        batch = collate(members, pad_id=pad_id)
        columns = _columns(teacher, batch, manifest)
        for place, sequence in enumerate(members):
            own = batch.sequence == place
            waiting[_key(sequence)] = {name: values[own] for name, values in columns.items()}
        done += len(members)
        tokens += len(batch.targets)
        if tokens >= SHARD_TOKENS:
            shards.add(waiting)
            waiting, tokens = {}, 0
        if progress is not None:
            progress(done, len(todo))
    if waiting:
        shards.add(waiting)
    return len(todo)


def _key(sequence: TokenSequence) -> str:
    ids = [*sequence.prompt_ids, *sequence.response_ids]
    return sequence_key(ids, len(ids) - max(len(sequence.prompt_ids), 1))


def _columns(teacher: Teacher, batch: Batch, manifest: Manifest) -> dict[str, Tensor]:
    """The numbers of each response token of a batch, on the CPU."""
    rows = teacher.score(batch, Wants(64, logits=True))
    parts: dict[str, list[Tensor]] = {}
    chance_NK = _chance(batch, manifest) if manifest.kind == "sampled" else torch.zeros(0)
    for chunk in chunks(len(batch.targets), chunk_rows(manifest.vocabulary, device=batch.targets.device)):
        log_p_nV = log_softmax(rows.logits(chunk))
        targets_n = batch.targets[chunk].to(log_p_nV.device)
        found = {"logps": gather_logps(log_p_nV, targets_n).float()}
        if manifest.kind == "topk":
            found |= _top(log_p_nV, manifest)
        if manifest.kind == "sampled":
            found["ids"] = _drawn(log_p_nV, chance_NK[chunk].to(log_p_nV.device)).int()
        for name, values in found.items():
            parts.setdefault(name, []).append(values.cpu())
    return {name: torch.cat(values) for name, values in parts.items()}


def _top(log_p_nV: Tensor, manifest: Manifest) -> dict[str, Tensor]:
    """The k likeliest tokens, and the log of the mass of the others, which the rounding of the k does not touch."""
    top = log_p_nV.topk(min(manifest.k, manifest.vocabulary), dim=-1)
    others_nV = log_p_nV.scatter(-1, top.indices, -torch.inf)
    return {"ids": top.indices.int(), "top": top.values.to(DTYPES[manifest.dtype]), "rest": others_nV.logsumexp(-1)}


def _chance(batch: Batch, manifest: Manifest) -> Tensor:
    """Uniform numbers `[N, k]` that decide the draws: a response has its own, whatever stands beside it."""
    parts = []
    for (prompt, response), count in zip(batch.sequences, batch.lengths.tolist(), strict=True):
        digest = hashlib.sha256(f"{manifest.seed}/{sequence_key([*prompt, *response], count)}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        parts.append(torch.rand(count, manifest.k, generator=generator, dtype=torch.float64))
    return torch.cat(parts)


def _drawn(log_p_nV: Tensor, chance_nK: Tensor) -> Tensor:
    """Ids `[n, k]` drawn from each row: the first whose cumulative probability is above the uniform number."""
    mass_nV = log_p_nV.double().exp().cumsum(-1)
    return torch.searchsorted(mass_nV, chance_nK * mass_nV[:, -1:], right=True).clamp(max=log_p_nV.shape[1] - 1)
