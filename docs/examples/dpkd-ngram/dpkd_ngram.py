"""A bigram model, counted in a text file, as a teacher: `teacher.kind=ngram`."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from dpkd.api import (
    Block,
    Teacher,
    TeacherAccess,
    TeacherBatch,
    TeacherOffer,
    TeacherOutput,
    TeacherSpec,
    Wants,
    hookimpl,
)


class NgramConfig(Block):
    """Where the counts come from."""

    path: str = Field(description="a text file")
    alpha: float = Field(0.1, gt=0, description="added to every count, so that no token is impossible")


class NgramOutput(TeacherOutput):
    """log p(token | token before it) of some rows, made when it is asked for."""

    def __init__(self, before_N: Tensor, counts: NgramTeacher, targets_N: Tensor, chunk: int) -> None:
        super().__init__(targets_N, chunk)
        self.before_N, self.counts = before_N, counts

    def logits(self, rows: slice) -> Tensor:
        return self.counts.log_probs(self.before_N[rows])


class NgramTeacher(Teacher):
    """p(b | a) = (count(a b) + α) / (count(a) + α V), in the student's own tokens."""

    offers = TeacherAccess.LOGITS

    def __init__(self, config: NgramConfig) -> None:
        self.config_, self.text = config, Path(config.path).read_text(encoding="utf-8")

    def describe(self) -> str:
        return f"bigrams of {self.config_.path}, offers {self.offers.value}"

    def fingerprint(self) -> str:
        return hashlib.sha256(f"{self.config_.alpha}\n{self.text}".encode()).hexdigest()[:16]

    def check(self, tokenizer: Any) -> None:
        self.student_tokenizer = tokenizer

    def load(self, device: torch.device, dtype: torch.dtype | None = None) -> None:
        ids = torch.tensor(self.student_tokenizer(self.text)["input_ids"])
        self.vocabulary, self.device = len(self.student_tokenizer), device
        pairs = torch.stack([ids[:-1], ids[1:]])
        size = (self.vocabulary, self.vocabulary)
        self.counts = torch.sparse_coo_tensor(pairs, torch.ones(pairs.shape[1]), size, check_invariants=True).coalesce()

    def log_probs(self, before_n: Tensor) -> Tensor:
        rows = torch.stack([self.counts[int(token)].to_dense() for token in before_n]) + self.config_.alpha
        return (rows / rows.sum(-1, keepdim=True)).log().to(self.device)

    def score(self, batch: TeacherBatch, wants: Wants) -> NgramOutput:
        before = [
            token
            for prompt, response in batch.sequences
            for token in [*prompt[-1:], *response][: len(response) if prompt else len(response) - 1]
        ]
        return NgramOutput(torch.tensor(before), self, batch.targets, wants.chunk)


SPEC = TeacherSpec(
    name="ngram",
    summary="bigrams of a text file",
    open=NgramTeacher,
    offer=lambda config: TeacherOffer(TeacherAccess.LOGITS, what="the n-gram model", writes=False),
    config=NgramConfig,
)


@hookimpl
def dpkd_teachers() -> list[TeacherSpec]:
    return [SPEC]
