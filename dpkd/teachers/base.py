"""What the engine asks of a teacher, whatever it is: a model in memory, a store, a server, several of them.

Shapes: N response positions of a micro-batch, n of one chunk, V shared vocabulary, H hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

from torch import Tensor, nn

from dpkd.api import Signal, TeacherAccess
from dpkd.cross_tokenizer.retokenize import AlignedBatch
from dpkd.data.batches import Batch


class Wants(NamedTuple):
    """What a micro-batch needs of the teacher.

    chunk   rows of logits that may be held at a time
    layers  the hidden states that losses read
    """

    chunk: int
    logps: bool = False
    logits: bool = False
    layers: tuple[int, ...] = ()

    @property
    def anything(self) -> bool:
        """Whether the teacher is needed at all."""
        return self.logps or self.logits or bool(self.layers)


class TeacherOutput(Protocol):
    """What a teacher says of one micro-batch. Logits are made a chunk at a time: `[N, V]` is never held."""

    @property
    def layers(self) -> Mapping[int, Tensor]:
        """Hidden states `[N, H]` by layer, those that were wanted."""

    def logits(self, rows: slice) -> Tensor:
        """Logits `[n, V]` of some rows, in float32, without gradient."""

    def raw(self, rows: slice) -> tuple[Tensor, float]:
        """Logits `[n, V]` of some rows in the type that they come in, up to a factor, and that factor."""

    def logps(self) -> Tensor:
        """Log-prob `[N]` in nats of each response token."""

    def signals(self, student_logits_nV: Tensor, targets_n: Tensor, rows: slice) -> Mapping[Signal, Tensor]:
        """What a loss that reads the teacher gets for some rows of the student, in place of the plain signals."""

    def is_finite(self) -> bool:
        """Whether its numbers are; asked when a loss is not."""


class Teacher(Protocol):
    """A frozen teacher.

    offers      what it can give; compared with what the losses need before anything is loaded
    measurable  whether it has the whole distribution at every row of the student's own tokens, so that divergences
                can be logged
    model       the causal LM, where it is one in this process: a student may start from its layers
    widest      logits of a row that a loss sees, where that is more than the student's vocabulary
    """

    @property
    def offers(self) -> TeacherAccess: ...

    @property
    def measurable(self) -> bool: ...

    @property
    def model(self) -> nn.Module | None: ...

    @property
    def widest(self) -> int | None: ...

    def score(self, batch: Batch | AlignedBatch, wants: Wants) -> TeacherOutput:
        """What it says of the response positions of a batch, without gradient; AlignedBatch across tokenizers."""
