"""A teacher that is not in memory: what it would say of fixed text is read from a store."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpkd.api import TeacherAccess
from dpkd.api.teachers import SharedVocabulary, Teacher, TeacherOutput, TeacherText, Wants
from dpkd.cross_tokenizer.retokenize import AlignedBatch
from dpkd.data.batches import Batch
from dpkd.errors import DpkdError
from dpkd.functional import at_least_float32
from dpkd.models.tokenizers import tokenizer_fingerprint
from dpkd.teachers.store_manifest import Manifest, read_manifest
from dpkd.teachers.store_shards import Shards, sequence_key


class StoredRows(TeacherOutput):
    """What a store knows of the packed rows `[N]`.

    given   [N] log-probs of the response tokens
    ids     [N, K] some tokens, top [N, K] their log-probs, rest [N] log of the mass of all others
    others  [N] how many others there are, where an id may be in a row twice
    """

    def __init__(
        self,
        given: Tensor,
        ids: Tensor,
        top: Tensor,
        rest: Tensor,
        *,
        targets: Tensor,
        wants: Wants,
        vocabulary: int,
        others: Tensor | None = None,
    ) -> None:
        super().__init__(targets, wants.chunk)
        self.given, self.ids, self.top, self.rest, self.vocabulary = given, ids, top, rest, vocabulary
        self.others = given.new_full((len(given),), vocabulary - ids.shape[1]) if others is None else others

    def logits(self, rows: slice) -> Tensor:
        """Log-probs `[n, V]` of some rows: those stored as they are, the mass of the rest spread evenly over it.

        What only looks at the stored tokens and at the mass of the rest (topk-kl) sees the teacher exactly.
        """
        ids_nK, logps_nK = self.ids[rows], at_least_float32(self.top[rows])
        each_n = at_least_float32(self.rest[rows]) - self.others[rows].clamp(min=1).log()
        dense_nV = each_n.unsqueeze(1).expand(-1, self.vocabulary).clone()
        return dense_nV.scatter_(1, ids_nK, logps_nK)

    def logps(self) -> Tensor:
        """Log-prob `[N]` in nats of each response token, as it was stored."""
        return self.given

    def is_finite(self) -> bool:
        """Whether the stored log-probs are."""
        return bool(torch.isfinite(self.given).all()) and bool(torch.isfinite(self.top).all())


class StoreTeacher(Teacher):
    """A store of what a teacher says of fixed text, in the place of a model."""

    measurable = False

    def __init__(self, folder: str | Path) -> None:
        """Raises DpkdError when the folder holds no store."""
        self.manifest: Manifest = read_manifest(folder)
        self.folder = Path(folder)
        self.vocabulary = self.manifest.vocabulary

    @property
    def offers(self) -> TeacherAccess:  # type: ignore[override]
        """What kind of numbers it has."""
        return self.manifest.offer.access

    def describe(self) -> str:
        return f"none in memory; the store {self.folder} has {self.manifest.sentence()}"

    def fingerprint(self) -> str:
        return self.manifest.model

    def check(self, tokenizer: Any) -> None:
        if self.manifest.tokenizer != tokenizer_fingerprint(tokenizer):
            raise DpkdError(
                f"teacher.store: {self.folder} was written with another tokenizer than the student's: its ids mean "
                "other tokens"
            )

    def load(self, device: torch.device, dtype: torch.dtype | None = None) -> None:
        self._shards = Shards(self.folder)
        self._device = device

    def share(self, tokenizer: Any, student_rows: int) -> SharedVocabulary:
        if self.vocabulary > student_rows:
            raise DpkdError(
                f"teacher.store: {self.folder} has ids up to {self.vocabulary - 1:,}, but the student's output head "
                f"has only {student_rows:,} rows"
            )
        return SharedVocabulary(self.vocabulary)

    def score(self, batch: Batch | AlignedBatch, wants: Wants) -> StoredRows:
        """What is known of each response position; for a `sampled` store the empirical distribution of the draws."""
        assert isinstance(batch, Batch)
        found = self._read(batch)
        given_N = found.get("logps", torch.zeros(0, device=self._device))
        ids_NK, top_NK, rest_N = given_N.new_zeros(len(given_N), 0).long(), given_N.new_zeros(len(given_N), 0), given_N
        if "ids" in found:
            ids_NK = found["ids"].long()
            top_NK, rest_N = found.get("top", torch.empty(0)), found.get("rest", torch.empty(0))
        if self.manifest.kind == "sampled":
            top_NK = (_counts(ids_NK) / self.manifest.k).log()
            rest_N = torch.full((len(ids_NK),), -math.inf, device=self._device)
        return StoredRows(
            given_N, ids_NK, top_NK, rest_N, targets=batch.targets, wants=wants, vocabulary=self.vocabulary
        )

    def text(self) -> TeacherText:
        """Its responses were written with it."""
        return TeacherText(None, self.vocabulary, self.manifest.model, self.folder / "responses")

    def _read(self, batch: Batch) -> dict[str, Tensor]:
        """The rows of a batch, packed like its own. Raises DpkdError for text that the store does not have."""
        parts = [
            self._shards.read(sequence_key([*prompt, *response], count))
            for (prompt, response), count in zip(batch.sequences, batch.lengths.tolist(), strict=True)
            if count
        ]
        names = parts[0].keys() if parts else ("logps",)
        return {name: torch.cat([part[name] for part in parts]).to(self._device) for name in names if parts}


def _counts(ids_NK: Tensor) -> Tensor:
    """How often the row of each drawn id has it `[N, K]`: equal ids stand for one token with one count."""
    return (ids_NK.unsqueeze(2) == ids_NK.unsqueeze(1)).sum(-1).float()
