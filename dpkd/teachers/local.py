"""A teacher that is a model in memory: it offers text, log-probs of given tokens, full logits and hidden states."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dpkd.api import TeacherAccess
from dpkd.api.teachers import SharedVocabulary, Teacher, TeacherOutput, TeacherText, Wants
from dpkd.cross_tokenizer.retokenize import AlignedBatch
from dpkd.data.batches import Batch
from dpkd.errors import DpkdError
from dpkd.models.head import Head, check_head, head_of
from dpkd.models.in_memory import InMemory
from dpkd.models.layers import layer_rows
from dpkd.models.loading import DTYPES, count_parameters
from dpkd.models.quantization import check_quantization, quantization_of, weight_bytes
from dpkd.models.settings import TeacherSettings
from dpkd.models.tokenizers import shared_vocabulary


class TeacherRows(TeacherOutput):
    """The teacher's hidden states of the packed rows `[N, H]`, and its head: logits are made a chunk at a time."""

    def __init__(
        self, hidden: Tensor, head: Head, targets: Tensor, chunk: int, layers: Mapping[int, Tensor] | None = None
    ) -> None:
        super().__init__(targets, chunk, layers)
        self.hidden, self.head = hidden, head
        self._kept: tuple[int, Tensor] = (0, hidden[:0])  # the logits of a chunk, and its first row

    @torch.no_grad()
    def logits(self, rows: slice) -> Tensor:
        """Logits `[n, V]` of some rows, in float32, without gradient; do not change them.

        The product is computed for a chunk, though who asks may take a few rows at a time.
        """
        start, stop, _ = rows.indices(len(self.hidden))
        if 2 * (stop - start) > self.chunk:
            return self.head.logits(self.hidden[rows])
        first, kept_nV = self._kept
        if not first <= start <= stop <= first + len(kept_nV):
            self._kept = (start, kept_nV[:0].clone())  # its memory first
            del kept_nV
            first, kept_nV = self._kept = start, self.head.logits(self.hidden[start : start + self.chunk])
        return kept_nV[start - first : stop - first]

    @torch.no_grad()
    def raw(self, rows: slice) -> tuple[Tensor, float]:
        """Logits `[n, V]` of some rows in the type of the head's product, up to a factor, and that factor."""
        if self.head.rule.softcap is not None:
            return super().raw(rows)
        return self.head.raw(self.hidden[rows].to(self.head.weight.dtype)), self.head.rule.scale

    def is_finite(self) -> bool:
        """Whether hidden states and some logits are."""
        return bool(torch.isfinite(self.hidden).all()) and super().is_finite()


class LocalTeacher(Teacher):
    """A frozen causal LM in eval mode."""

    offers = TeacherAccess.HIDDEN

    def __init__(self, settings: TeacherSettings, in_memory: InMemory) -> None:
        """Reads configuration and tokenizer. Raises DpkdError when they, the device or a package are not there."""
        check_quantization(settings)
        check_device(settings.device)
        self._settings, self._in_memory = settings, in_memory
        self.config = in_memory.config(settings)
        self.tokenizer = in_memory.tokenizer(settings)
        self.forwards = 0

    @classmethod
    def of(cls, model: nn.Module, vocabulary: int, device: torch.device) -> LocalTeacher:
        """The teacher that a model in memory is, over the first ids of its vocabulary."""
        teacher = cls.__new__(cls)
        teacher.forwards = 0
        teacher._use(model, device)
        teacher.cut(vocabulary)
        return teacher

    def describe(self) -> str:
        packed = quantization_of(self._settings)
        size = f"{count_parameters(self.config) / 1e6:,.1f} M parameters"
        return f"{self._settings.model}, {size}, offers {self.offers.sentence}" + (
            f", weights in {packed}" if packed else ""
        )

    def fingerprint(self) -> str:
        return self._in_memory.fingerprint(self._settings)

    def weight_bytes(self, dtype: torch.dtype | None = None) -> float:
        stored = dtype or getattr(self.config, "dtype", None) or torch.float32
        width = DTYPES.get(self._settings.dtype, stored).itemsize
        return float(weight_bytes(self.config, count_parameters(self.config), width, quantization_of(self._settings)))

    def load(self, device: torch.device, dtype: torch.dtype | None = None) -> None:
        home = torch.device(self._settings.device or device)
        model: Any = self._in_memory.load(self._settings, device=home, dtype=dtype)
        check_head(model)
        self._use(model, device)

    def share(self, tokenizer: Any, student_rows: int) -> SharedVocabulary:
        shared = shared_vocabulary(tokenizer, self.tokenizer, student_rows, self.vocabulary)
        self.cut(shared.size)
        return shared

    @torch.no_grad()
    def score(self, batch: Batch | AlignedBatch, wants: Wants) -> TeacherRows:
        """One forward of the backbone; log-probs and logits are made from its rows when they are asked for."""
        assert isinstance(batch, Batch)
        assert self.model is not None
        self.forwards += 1
        home = next(self.model.parameters()).device
        hidden, states = layer_rows(self.model, batch.to(home), wants.layers)
        there = {i: state.to(self._device) for i, state in states.items()}
        return TeacherRows(hidden.to(self._device), self._head, batch.targets.to(self._device), wants.chunk, there)

    def text(self) -> TeacherText:
        return TeacherText(self.model, self.vocabulary, self.fingerprint())

    def _use(self, model: nn.Module, device: torch.device) -> None:
        self.model, self._device = model.eval(), device
        self.vocabulary = model.get_output_embeddings().weight.shape[0]  # type: ignore[operator]

    def cut(self, vocabulary: int) -> None:
        """Predict the first ids only. The head is on the student's device, where the losses are computed."""
        assert self.model is not None
        self.vocabulary = vocabulary
        self.model.requires_grad_(False)  # not before: a student that starts from it takes over what is trained
        head = head_of(self.model, vocabulary)
        bias = None if head.bias is None else head.bias.detach().to(self._device)
        self._head = Head(head.weight.detach().to(self._device), bias, head.rule).cast(head.weight.dtype)


def check_device(name: str | None) -> None:
    """Raises DpkdError when a device is not available on this machine."""
    if name is None:
        return
    try:
        # The smallest use of it: a name may be right and the device absent.
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        first = str(error).strip().splitlines()[0]
        raise DpkdError(
            f"teacher.device: {name} is not available on this machine ({first}); expected cpu, cuda, cuda:1 or mps"
        ) from error
