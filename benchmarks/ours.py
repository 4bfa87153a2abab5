"""One step of dpkd's own engine: step batches, micro-batches, chunked head, one denominator, gradients; no update."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from dpkd.api import Family, LossSpec, Response, Rollout, TeacherAccess, Text
from dpkd.api.teachers import Teacher, TeacherOutput, Wants
from dpkd.data.batches import PLAIN, Layout, TokenSequence, collate
from dpkd.models.chunked import token_logps
from dpkd.models.head import head_of, hidden_rows
from dpkd.models.layouts import worth_packing
from dpkd.plugins import load_registry
from dpkd.teachers.local import LocalTeacher
from dpkd.train.auxiliary_losses import LanguageModelling, LanguageModellingConfig
from dpkd.train.loss_module import LossModule
from dpkd.train.microbatch import MicroBatcher, PromptGroup, StepBatch, Term
from dpkd.train.train_step import TrainStep

__all__ = ["engine_step", "usual_layout"]


class _NoUpdate:
    """Stands in for the optimizer: the same for every variant, so it is left out."""

    _step_supports_amp_scaling = True  # as the fused one: nobody waits to learn whether a step was finite

    def __init__(self, module: torch.nn.Module) -> None:
        self._module, self.param_groups = module, []

    def zero_grad(self, set_to_none: bool = True) -> None:
        self._module.zero_grad(set_to_none=True)

    def step(self) -> None:
        pass


class _Known(Teacher):
    """A teacher whose log-probs of the responses are in a store: read once, the same at every step."""

    offers, measurable = TeacherAccess.TOKEN_LOGPS, False

    def __init__(self, teacher: LocalTeacher) -> None:
        self._teacher, self._kept = teacher, {}

    def score(self, batch, wants):
        key = (len(batch.targets), int(batch.targets.sum()))
        if key not in self._kept:
            output = TeacherOutput(batch.targets, wants.chunk)
            known = self._teacher.score(batch, wants).logps()
            output.logps = lambda: known
            self._kept[key] = output
        return self._kept[key]


@torch.no_grad()
def _rolled_out(
    groups: list[PromptGroup], loss: Any, student: torch.nn.Module, teacher: LocalTeacher, chunk: int, pad_id: int
) -> list[PromptGroup]:
    """The groups with what a policy gradient reads: log-probs of the responses, as if the student had drawn them."""
    batch = collate([group.sequences[0] for group in groups], pad_id=pad_id).to(next(student.parameters()).device)
    of_student = token_logps(hidden_rows(student, batch), head_of(student), batch.targets, chunk)
    of_teacher = teacher.score(batch, Wants(chunk, logps=True)).logps()
    advantages = loss.advantages(Rollout(of_student, of_student, of_teacher, batch.sequence))
    columns = [values.cpu().split(batch.lengths.tolist()) for values in (of_student, of_teacher, advantages)]
    kept = []
    for i, group in enumerate(groups):
        q, p, a = (column[i] for column in columns)
        drawn = replace(
            group.responses[0], writer=Text.STUDENT, rollout_logps=q, behaviour_logps=q, teacher_logps=p, advantages=a
        )
        kept.append(PromptGroup(group.sequences, (drawn,)))
    return kept


def _units(sequences: Sequence[TokenSequence], pairs: bool) -> list[PromptGroup]:
    """One group per sequence, or per two neighbours."""
    size = 2 if pairs else 1
    groups = [tuple(sequences[i : i + size]) for i in range(0, len(sequences), size)]
    return [PromptGroup(group, tuple(Response(tuple(s.response_ids), Text.DATASET) for s in group)) for group in groups]


def _tokens(groups: Sequence[PromptGroup]) -> int:
    return sum(len(s.response_ids) - (not s.prompt_ids) for group in groups for s in group.sequences)


def usual_layout(device: torch.device, *, bf16: bool) -> Layout:
    """What a run has by default: packed rows where PyTorch's attention takes them."""
    return Layout(packed=bf16, columns=8) if device.type == "cuda" else PLAIN


def engine_step(
    name: str,
    models: tuple[torch.nn.Module, torch.nn.Module],
    sequences: Sequence[TokenSequence],
    *,
    stored: bool = False,
    corpus: Sequence[TokenSequence] = (),
    settings: dict[str, Any] | None = None,
    chunk_mib: float | str = "auto",
    bf16: bool = False,
    compiled: str | None = None,
    kernels: bool = True,
    shared: bool = True,
) -> Callable[[], Any]:
    """A step of the loss of a name on these sequences; for pairs, (y_t, y_s) are neighbours and follow one prompt.

    `shared`: they stand behind one copy of it. With `stored` the teacher's log-probs of the responses are known;
    `corpus` adds the pre-training term with KD. `compiled` names the backend by which torch compiles the loss of a
    chunk, `kernels` whether fused ones are used where they can be. The models decide the device.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    student, teacher = models
    device = next(student.parameters()).device
    spec: LossSpec = load_registry().get(LossSpec, name).spec
    loss = spec.loss(config := spec.config(**(settings or {})))
    vocabulary = student.get_output_embeddings().weight.shape[0]
    losses = {"main": loss} | ({"pretrain": LanguageModelling(LanguageModellingConfig(kd_ratio=0.5))} if corpus else {})
    if compiled is not None:
        loss.compile(backend=compiled)
    loss_module = LossModule(student, losses, vocabulary=vocabulary, chunk_mib=chunk_mib)
    if not kernels:
        loss_module._fused = lambda *_: None  # type: ignore[method-assign]
    live = LocalTeacher.of(teacher, vocabulary, device)
    pairs = spec.family is Family.PAIR
    groups = _units(sequences, pairs)
    if spec.family is Family.ROLLOUT:
        groups = _rolled_out(groups, loss, student, live, loss_module.chunk, vocabulary - 1)
    term = Term("main", spec.signals(config), 1.0, len(groups) if pairs else _tokens(groups))
    step_batches = [StepBatch("main", groups, [term], pairs)]
    if corpus:
        blocks = _units(corpus, pairs=False)
        step_batches.append(
            StepBatch("pretrain", blocks, [Term("pretrain", losses["pretrain"].reads(), 0.5, _tokens(blocks))])
        )
    AcceleratorState._reset_state()  # it keeps the precision of the first
    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision="bf16" if bf16 else "no")
    usual = usual_layout(device, bf16=bf16)
    looped = device.type == "cpu" and worth_packing(student)
    layouts = (usual, *([Layout(packed=True)] if looped else []))
    layouts += (usual._replace(packed=False, shared=True),) if shared else ()
    micro_batcher = MicroBatcher(len(sequences), vocabulary - 1, layouts=layouts, device=device)
    train_step = TrainStep(
        accelerator=accelerator,
        loss_module=loss_module,
        optimizer=_NoUpdate(loss_module),
        teacher=_Known(live) if stored else live,
        reference=None,
        micro_batcher=micro_batcher,
        clip=1.0,
    )
    return lambda: train_step(step_batches, lr=0.0, measure=False)
