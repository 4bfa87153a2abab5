"""A teacher that is not in memory: what it would say of fixed text is read from a store."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dpkd.data.batches import Batch
from dpkd.functional import at_least_float32
from dpkd.teachers.store_manifest import Manifest, read_manifest
from dpkd.teachers.store_shards import Shards, sequence_key


@dataclass(frozen=True)
class StoredRows:
    """What a store knows of the packed rows `[N]`: some tokens with their log-probs, and the mass of all others."""

    ids: Tensor  # [N, K]
    logps: Tensor  # [N, K]
    rest: Tensor  # [N] log of the mass that is left
    vocabulary: int

    def logits(self, rows: slice) -> Tensor:
        """Log-probs `[n, V]` of some rows: those stored as they are, the mass of the rest spread evenly over it.

        What only looks at the stored tokens and at the mass of the rest (topk-kl) sees the teacher exactly.
        """
        ids_nK, logps_nK = self.ids[rows], at_least_float32(self.logps[rows])
        others = self.vocabulary - ids_nK.shape[1]
        each_n = at_least_float32(self.rest[rows]) - math.log(max(1, others))
        dense_nV = each_n.unsqueeze(1).expand(-1, self.vocabulary).clone()
        return dense_nV.scatter_(1, ids_nK, logps_nK)


class StoreTeacher:
    """A store, in the place of a model."""

    def __init__(self, folder: Path, vocabulary: int, device: torch.device) -> None:
        """Raises DpkdError when the folder is no store."""
        self.manifest: Manifest = read_manifest(folder)
        self.folder = folder
        self.vocabulary = vocabulary
        self._shards = Shards(folder)
        self._device = device

    def _read(self, batch: Batch) -> dict[str, Tensor]:
        """The rows of a batch, packed like its own. Raises DpkdError for text that the store does not have."""
        parts = [
            self._shards.read(sequence_key([*prompt, *response], count))
            for (prompt, response), count in zip(batch.sequences, batch.lengths.tolist(), strict=True)
            if count
        ]
        names = parts[0].keys() if parts else ("logps",)
        return {name: torch.cat([part[name] for part in parts]).to(self._device) for name in names if parts}

    def logps(self, batch: Batch, chunk: int) -> Tensor:
        """Log-prob `[N]` in nats of each response token."""
        found = self._read(batch)
        return found["logps"] if found else torch.zeros(0, device=self._device)

    def rows(self, batch: Batch) -> StoredRows:
        """What is known of each response position; for a `sampled` store the empirical distribution of the draws."""
        found = self._read(batch)
        if not found:
            empty = torch.zeros(0, 1, device=self._device)
            return StoredRows(empty.long(), empty, empty[:, 0], self.vocabulary)
        if self.manifest.kind == "topk":
            return StoredRows(found["ids"].long(), found["top"], found["rest"], self.vocabulary)
        ids_NK = found["ids"].long()
        logps_NK = (_counts(ids_NK) / self.manifest.k).log()
        rest_N = torch.full((len(ids_NK),), -math.inf, device=self._device)
        return StoredRows(ids_NK, logps_NK, rest_N, self.vocabulary)


def _counts(ids_NK: Tensor) -> Tensor:
    """How often the row of each drawn id has it `[N, K]`: equal ids stand for one token with one count."""
    return (ids_NK.unsqueeze(2) == ids_NK.unsqueeze(1)).sum(-1).float()
