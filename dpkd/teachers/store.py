"""A teacher that is not in memory: what it would say of fixed text is read from a store."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from dpkd.api import Signal, TeacherAccess
from dpkd.cross_tokenizer.retokenize import AlignedBatch
from dpkd.data.batches import Batch
from dpkd.functional import at_least_float32
from dpkd.teachers.base import Wants
from dpkd.teachers.store_manifest import Manifest, read_manifest
from dpkd.teachers.store_shards import Shards, sequence_key


@dataclass(frozen=True)
class StoredRows:
    """What a store knows of the packed rows `[N]`: some tokens with their log-probs, and the mass of all others."""

    ids: Tensor  # [N, K]
    top: Tensor  # [N, K]
    rest: Tensor  # [N] log of the mass that is left
    vocabulary: int
    given: Tensor  # [N] log-probs of the response tokens
    layers: Mapping[int, Tensor] = field(default_factory=dict)  # a store has none

    def logits(self, rows: slice) -> Tensor:
        """Log-probs `[n, V]` of some rows: those stored as they are, the mass of the rest spread evenly over it.

        What only looks at the stored tokens and at the mass of the rest (topk-kl) sees the teacher exactly.
        """
        ids_nK, logps_nK = self.ids[rows], at_least_float32(self.top[rows])
        others = self.vocabulary - ids_nK.shape[1]
        each_n = at_least_float32(self.rest[rows]) - math.log(max(1, others))
        dense_nV = each_n.unsqueeze(1).expand(-1, self.vocabulary).clone()
        return dense_nV.scatter_(1, ids_nK, logps_nK)

    def raw(self, rows: slice) -> tuple[Tensor, float]:
        """The same logits, and the factor 1."""
        return self.logits(rows), 1.0

    def logps(self) -> Tensor:
        """Log-prob `[N]` in nats of each response token."""
        return self.given

    def signals(self, student_logits_nV: Tensor, targets_n: Tensor, rows: slice) -> Mapping[Signal, Tensor]:
        """What is known of the teacher's distribution, beside the student's logits."""
        return {Signal.TEACHER_LOGITS: self.logits(rows).to(student_logits_nV.dtype)}

    def is_finite(self) -> bool:
        """Whether the stored log-probs are."""
        return bool(torch.isfinite(self.given).all()) and bool(torch.isfinite(self.top).all())


class StoreTeacher:
    """A store, in the place of a model."""

    measurable = False
    model = None
    widest = None

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

    @property
    def offers(self) -> TeacherAccess:
        """What kind of numbers it has."""
        return {"tokens": TeacherAccess.TOKEN_LOGPS, "topk": TeacherAccess.TOP_K, "sampled": TeacherAccess.SAMPLED}[
            self.manifest.kind
        ]

    def score(self, batch: Batch | AlignedBatch, wants: Wants) -> StoredRows:
        """What is known of each response position; for a `sampled` store the empirical distribution of the draws."""
        assert isinstance(batch, Batch)
        found = self._read(batch)
        given_N = found.get("logps", torch.zeros(0, device=self._device))
        if "ids" not in found:
            empty = torch.zeros(len(given_N), 0, device=self._device)
            return StoredRows(empty.long(), empty, torch.zeros_like(given_N), self.vocabulary, given_N)
        ids_NK = found["ids"].long()
        if self.manifest.kind == "topk":
            return StoredRows(ids_NK, found["top"], found["rest"], self.vocabulary, given_N)
        logps_NK = (_counts(ids_NK) / self.manifest.k).log()
        rest_N = torch.full((len(ids_NK),), -math.inf, device=self._device)
        return StoredRows(ids_NK, logps_NK, rest_N, self.vocabulary, given_N)


def _counts(ids_NK: Tensor) -> Tensor:
    """How often the row of each drawn id has it `[N, K]`: equal ids stand for one token with one count."""
    return (ids_NK.unsqueeze(2) == ids_NK.unsqueeze(1)).sum(-1).float()
