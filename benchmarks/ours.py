"""One step of dpkd's own engine: streams, micro-batches, chunked head, one denominator, gradients; no update."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from dpkd.api import Family, LossSpec, Rollout, Text
from dpkd.data.batches import Layout, TokenSequence, collate
from dpkd.engine.auxiliary import LanguageModelling, LanguageModellingConfig
from dpkd.engine.distiller import Distiller
from dpkd.engine.step import Stepper
from dpkd.engine.work import Cutter, Stream, Term, Unit
from dpkd.host import load_host
from dpkd.models.chunked import token_logps
from dpkd.models.head import head_of, hidden_rows
from dpkd.teachers.live import LiveTeacher
from dpkd.text.responses import Response

__all__ = ["engine_step"]


class _NoUpdate:
    """Stands in for the optimiser: the same for every variant, so it is left out."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._module, self.param_groups = module, []

    def zero_grad(self, set_to_none: bool = True) -> None:
        self._module.zero_grad(set_to_none=True)

    def step(self) -> None:
        pass


class _Known:
    """A teacher whose log-probs of the responses are in a store: read once, the same at every step."""

    def __init__(self, teacher: LiveTeacher) -> None:
        self._teacher, self._kept = teacher, {}

    def logps(self, batch, chunk):
        key = (len(batch.targets), int(batch.targets.sum()))
        if key not in self._kept:
            self._kept[key] = self._teacher.logps(batch, chunk)
        return self._kept[key]


@torch.no_grad()
def _rolled_out(
    units: list[Unit], loss: Any, student: torch.nn.Module, teacher: LiveTeacher, chunk: int, pad_id: int
) -> list[Unit]:
    """The units with what a policy gradient reads: log-probs of the responses, as if the student had drawn them."""
    batch = collate([unit.sequences[0] for unit in units], pad_id=pad_id).to(next(student.parameters()).device)
    of_student = token_logps(hidden_rows(student, batch), head_of(student), batch.targets, chunk)
    of_teacher = teacher.logps(batch, chunk)
    advantages = loss.advantages(Rollout(of_student, of_student, of_teacher, batch.sequence))
    columns = [values.split(batch.lengths.tolist()) for values in (of_student, of_teacher, advantages)]
    kept = []
    for i, unit in enumerate(units):
        q, p, a = (tuple(column[i].tolist()) for column in columns)
        drawn = replace(
            unit.responses[0], writer=Text.STUDENT, rollout_logps=q, behaviour_logps=q, teacher_logps=p, advantages=a
        )
        kept.append(Unit(unit.sequences, (drawn,)))
    return kept


def _units(sequences: Sequence[TokenSequence], pairs: bool) -> list[Unit]:
    """One unit per sequence, or per two neighbours."""
    size = 2 if pairs else 1
    groups = [tuple(sequences[i : i + size]) for i in range(0, len(sequences), size)]
    return [Unit(group, tuple(Response(tuple(s.response_ids), Text.DATASET) for s in group)) for group in groups]


def _tokens(units: Sequence[Unit]) -> int:
    return sum(len(s.response_ids) - (not s.prompt_ids) for unit in units for s in unit.sequences)


def engine_step(
    name: str, models: tuple[torch.nn.Module, torch.nn.Module], sequences: Sequence[TokenSequence], *,
    stored: bool = False, corpus: Sequence[TokenSequence] = (), settings: dict[str, Any] | None = None,
    chunk_mib: float = 32.0, bf16: bool = False, compiled: str | None = None, shared: bool = True,
) -> Callable[[], Any]:  # fmt: skip
    """A step of the loss of a name on these sequences; for pairs, (y_t, y_s) are neighbours and follow one prompt.

    `shared`: they stand behind one copy of it. With `stored` the teacher's log-probs of the responses are known;
    `corpus` adds the pre-training term with KD. `compiled` names the backend by which torch compiles the loss of a
    chunk. The models decide the device.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    student, teacher = models
    device = next(student.parameters()).device
    spec: LossSpec = load_host().get(name).spec
    loss = spec.loss(config := spec.config(**(settings or {})))
    vocabulary = student.get_output_embeddings().weight.shape[0]
    losses = {"main": loss} | ({"pretrain": LanguageModelling(LanguageModellingConfig(kd_ratio=0.5))} if corpus else {})
    if compiled is not None:
        loss.compile(backend=compiled)
    distiller = Distiller(student, losses, vocabulary=vocabulary, chunk_mib=chunk_mib)
    live = LiveTeacher(teacher, vocabulary, device)
    pairs = spec.family is Family.PAIR
    units = _units(sequences, pairs)
    if spec.family is Family.ROLLOUT:
        units = _rolled_out(units, loss, student, live, distiller.chunk, vocabulary - 1)
    term = Term("main", spec.signals(config), 1.0, len(units) if pairs else _tokens(units))
    streams = [Stream("main", units, [term], pairs)]
    if corpus:
        blocks = _units(corpus, pairs=False)
        streams.append(Stream("pretrain", blocks, [Term("pretrain", losses["pretrain"].reads(), 0.5, _tokens(blocks))]))
    AcceleratorState._reset_state()  # it keeps the precision of the first
    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision="bf16" if bf16 else "no")
    cutter = Cutter(len(sequences), vocabulary - 1, layout=Layout(shared=shared), device=device)
    stepper = Stepper(
        accelerator, distiller, _NoUpdate(distiller), _Known(live) if stored else live, None, cutter, 1.0
    )  # fmt: skip
    return lambda: stepper(streams, lr=0.0, measure=False)
