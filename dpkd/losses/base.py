"""What all losses of the library have: their settings, what they read, and the one way to a number."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from dpkd.api import LossConfig, LossSpec, Signal
from dpkd.config.problems import checked
from dpkd.data.batches import LabeledRows
from dpkd.errors import DpkdError
from dpkd.functional import reduce_loss
from dpkd.losses.outputs import Output
from dpkd.models.chunked import chunk_rows, objective

Count: TypeAlias = int | float | Tensor
Signals: TypeAlias = dict[Signal, Any]


class ZooLoss(nn.Module):
    """A loss of the registry with its settings; `loss` is the plugin's module, whose weights (if any) train along."""

    def __init__(self, spec: LossSpec, config: LossConfig, vocabulary: int | None) -> None:
        """Made by `dpkd.losses.get` from the `spec` and `config` of the loss, and the `vocabulary` that it compares."""
        super().__init__()
        self.spec, self.vocabulary = spec, vocabulary
        self.loss: Any = spec.loss(config)

    @property
    def config(self) -> LossConfig:
        """The settings."""
        config: LossConfig = self.loss.config
        return config

    @property
    def reads(self) -> frozenset[Signal]:
        """What the loss needs under its settings; each is the name of an argument."""
        return self.spec.signals(self.config)

    def set(self, **settings: Any) -> None:
        """Change some `settings` between steps, for a schedule. Raises SettingsError for wrong ones."""
        self.loss.config = checked(self.spec.config, {**self.config.model_dump(), **settings}, "loss")

    def extra_repr(self) -> str:
        """The name and the settings, for printing."""
        return ", ".join([repr(self.spec.name), *(f"{k}={v!r}" for k, v in self.config.model_dump().items())])

    def _values(self, kind: type[Any], signals: Mapping[Signal, Any], device: torch.device) -> Tensor:
        """The plugin's values `[N]` or `[P]`, from what it declares to read. Raises DpkdError where that is missing."""
        reads = self.reads - {Signal.REWARDS}  # read before, by the advantages
        if missing := reads - signals.keys():
            raise DpkdError(
                f"the loss {self.spec.name} reads {', '.join(sorted(missing))}, which is not given; it reads "
                f"{', '.join(sorted(self.reads))}"
            )
        with torch.autocast(device.type, enabled=False):
            values: Tensor = self.loss(kind({signal: signals[signal] for signal in reads}))
        return values

    def _size(self, student: int, teacher: int | None) -> int:
        """The ids that are compared. Raises DpkdError where the models differ and nobody says how many they share."""
        smallest = student if teacher is None else min(student, teacher)
        if self.vocabulary is not None and self.vocabulary > smallest:
            raise DpkdError(f"vocabulary: is {self.vocabulary:,}, but there are logits for {smallest:,} ids only")
        if self.vocabulary is None and smallest != max(student, teacher or 0):
            raise DpkdError(
                f"the student has logits for {student:,} ids and the teacher for {teacher:,}. If they share a "
                f"tokenizer, say how many ids it has: losses.get({self.spec.name!r}, vocabulary=len(tokenizer), ...)"
            )
        return self.vocabulary or student

    def _reduced(
        self,
        kind: type[Any],
        where: LabeledRows,
        student: Output | None,
        teacher: Output | None,
        others: Signals,
        count: Count | None,
        chunk_mib: float,
    ) -> Tensor:
        """The loss of the labeled tokens: at once from logits, chunk by chunk from hidden states."""
        if student is None:
            raise DpkdError(f"the loss {self.spec.name} reads student_logits, which is not given")
        size = self._size(student.vocabulary, None if teacher is None else teacher.vocabulary)
        ours = student.at(where.rows, size)
        theirs = None if teacher is None else teacher.at(where.rows, size)
        items = len(where.rows) if count is None else count

        def chunk_loss(logits_nV: Tensor, rows: slice) -> Tensor:
            signals = {signal: values[rows] for signal, values in others.items()}
            signals[Signal.STUDENT_LOGITS] = logits_nV
            if self.spec.chosen_k is not None:
                likeliest = min(self.spec.chosen_k(self.config), size)
                signals[Signal.CHOSEN_IDS] = logits_nV.detach().topk(likeliest, dim=-1).indices
            if theirs is not None:
                with torch.no_grad():
                    signals[Signal.TEACHER_LOGITS] = theirs.logits(rows).detach().to(logits_nV.dtype)
            return reduce_loss(self._values(kind, signals, logits_nV.device), items)

        if ours.head is None:
            return chunk_loss(ours.values, slice(None))
        weights = [p for p in self.loss.parameters() if p.requires_grad]
        return objective(chunk_loss, ours.values, ours.head, chunk_rows(size, chunk_mib), weights)


def about_tokens(where: LabeledRows, labels: Tensor, by_student: Tensor | None = None) -> Signals:
    """What a loss may read of the tokens themselves; nothing follows a token in its span where tokenizers agree."""
    nothing_N = torch.zeros(len(where.rows), device=labels.device)
    signals: Signals = {Signal.TARGETS: where.targets, Signal.STUDENT_REST: nothing_N, Signal.TEACHER_REST: nothing_N}
    if by_student is not None:
        signals[Signal.BY_STUDENT] = by_student.bool()[where.places // labels.shape[1]]
    return signals
