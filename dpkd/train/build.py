"""Puts the parts of a run together: data, models, losses, writers, optimizer. Cheap checks come first."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.fsdp import register_fsdp_forward_method

from dpkd.api import HIDDEN, Family, Signal
from dpkd.api.inputs import REFERENCE_LOGPS
from dpkd.api.teachers import Teacher
from dpkd.config.objective import chosen_ids
from dpkd.config.resolve import Resolved
from dpkd.config.settings import BatchSettings, RunSettings
from dpkd.data.batch_sampler import BatchSampler
from dpkd.data.batches import Layout
from dpkd.data.corpus import read_corpus
from dpkd.data.encode import check_ids
from dpkd.errors import DpkdError
from dpkd.models.attention import FLASH, implementation, reads_packed_rows
from dpkd.models.captured import capture
from dpkd.models.compile import WORTH_STEPS, Context, code_of, compile_checked, compile_loss, undo
from dpkd.models.device import teacher_dtype
from dpkd.models.fused import kl_sum_of
from dpkd.models.fused import why_not as why_not_fused
from dpkd.models.head import causal_lm, check_head
from dpkd.models.in_memory import InMemory
from dpkd.models.layouts import why_not, worth_packing
from dpkd.models.lora import add_lora
from dpkd.models.sharding import is_sharded, zero_config
from dpkd.models.student_init import make_student, recompute_activations
from dpkd.teachers.local import LocalTeacher
from dpkd.train.auxiliary_losses import LanguageModelling, LanguageModellingConfig
from dpkd.train.ema import follow
from dpkd.train.hidden_states import bind, check_stack
from dpkd.train.loss_module import LossModule
from dpkd.train.memory_trace import sample_inputs
from dpkd.train.microbatch import MicroBatcher
from dpkd.train.optimizers import make_optimizer
from dpkd.train.prepare import RunData, prepare
from dpkd.train.progress import Display
from dpkd.train.rollouts import Rollouts, check_processes, make_groups
from dpkd.train.schedules import Schedules
from dpkd.train.step_batches import LM_READS, CorpusBatches, StepBatchBuilder
from dpkd.train.timings import Timings
from dpkd.train.train_step import TrainStep
from dpkd.train.zero import Zero, check_zero

if TYPE_CHECKING:
    from accelerate import Accelerator

# Columns on a GPU: masks of other widths are copied in every layer, and compiled code has a second form for them.
ALIGNED = 8


@dataclass(kw_only=True)
class RunParts:
    """A run, ready to go."""

    run_data: RunData
    teacher: Teacher | None
    vocabulary: int
    train_step: TrainStep
    builder: StepBatchBuilder
    schedules: Schedules
    rollouts: Rollouts
    facts: dict[str, Any]

    def prepare_sources(self) -> None:
        """Have written what can be before the first step: the teacher's responses."""
        for group in self.builder.groups:
            group.source.prepare()

    def close(self) -> None:
        """Give back what lies outside the models."""
        self.rollouts.close()
        undo(self.train_step.inner.student)
        if self.train_step.zero is not None:
            self.train_step.zero.close()
        if self.teacher is not None:
            if self.teacher.model is not None:
                undo(self.teacher.model)  # others use it too
            self.teacher.close()


def assemble(
    resolved: Resolved, accelerator: Accelerator, display: Display, timings: Timings | None = None
) -> RunParts:
    """Load everything that a run needs; `timings` gets where the time goes.

    Raises DpkdError when models, tokenizers or data do not fit together.
    """
    settings = resolved.settings
    _check_sharding(accelerator)
    check_zero(settings)
    check_processes(resolved, accelerator.num_processes)
    timings = timings or Timings()
    with timings("data"):
        run_data = prepare(resolved, display)
    corpus = _corpus(settings, run_data.tokenizer, run_data.steps, display)
    with timings("models"):
        models = _Models(resolved, accelerator, run_data, display)
    check_ids(run_data.data.prompts, causal_lm(models.student).get_input_embeddings().weight.shape[0], "the student")
    # While the student is whole: it may be sharded below.
    layouts = models.layouts(settings.batch, accelerator.autocast, may_loop=settings.train.compile != "on")
    losses = _losses(resolved)
    whole = _loss_module(resolved, run_data, models, losses).to(accelerator.device)
    with timings("compile"):
        _compile(resolved, models, losses, run_data.steps, layouts, accelerator, display)
    with timings("optimizer"):
        optimizer = make_optimizer(whole, settings.train)
        if settings.train.ema is not None:
            follow(optimizer, settings.train.ema)
        zero = None if zero_config() is None else Zero(whole, optimizer, settings)
        loss_module, optimizer = (
            accelerator.prepare(whole, optimizer) if zero is None else (zero.engine, zero.optimizer)
        )
    if models.teacher is not None and models.teacher.of_student and is_sharded(models.student):
        raise DpkdError("teacher.base: a sharded student is not whole when its base is asked; name a teacher.model")
    if _graphs(settings, accelerator):
        models.capture(display)
    train_step = TrainStep(
        accelerator=accelerator,
        loss_module=loss_module,
        optimizer=optimizer,
        teacher=models.teacher,
        reference=models.reference,
        autocast_teacher=models.autocasts,
        micro_batcher=_micro_batcher(settings, run_data, layouts, accelerator),
        clip=settings.train.clip,
        zero=zero,
        timings=timings,
    )
    register_fsdp_forward_method(train_step.inner, "lend")  # nothing happens to it where the student is not sharded
    rollouts = Rollouts(
        resolved=resolved,
        student=models.student,
        lend=train_step.inner.lend,
        teacher=models.teacher,
        vocabulary=models.vocabulary,
        run_data=run_data,
        accelerator=accelerator,
        display=display,
    )
    lm_reads = losses["pretrain"].reads() if "pretrain" in losses else LM_READS
    groups = make_groups(resolved, losses, rollouts)
    return RunParts(
        run_data=run_data,
        teacher=models.teacher,
        vocabulary=models.vocabulary,
        train_step=train_step,
        builder=StepBatchBuilder(groups, settings.terms, lm_reads, run_data.data.prompts, corpus),
        schedules=Schedules(losses, {objective.name: objective.schedules for objective in resolved.objectives}),
        rollouts=rollouts,
        facts=_facts(resolved, run_data, models, corpus, layouts),
    )


def _loss_module(resolved: Resolved, run_data: RunData, models: _Models, losses: dict[str, Any]) -> LossModule:
    """The student with its losses, those on hidden states bound to the models."""
    layers = bind(resolved, losses, run_data.student_config, run_data.teacher_config)
    teacher, reward = models.teacher, resolved.loss.reward_scale
    if layers:
        check_stack(models.student)
        check_stack(teacher.model if teacher is not None else None)
    return LossModule(
        models.student,
        losses,
        vocabulary=models.vocabulary,
        chunk_mib=resolved.settings.train.chunk_mib,
        layers=layers,
        widest=teacher.widest if teacher is not None else None,
        chosen=chosen_ids(resolved.objectives),
        reward_scale=1.0 if reward is None else float(reward(resolved.main.config)),
    )


def _micro_batcher(
    settings: RunSettings, run_data: RunData, layouts: tuple[Layout, ...], accelerator: Accelerator
) -> MicroBatcher:
    other = None if run_data.teacher is None else run_data.teacher.tokenizer
    return MicroBatcher(
        settings.train.micro_batch_size,
        run_data.tokenizer.pad_token_id,
        settings.batch.tokens,
        layouts,
        accelerator.process_index,
        accelerator.num_processes,
        accelerator.device,
        teacher_pad_id=0 if other is None else other.pad_token_id,
    )


def _facts(
    resolved: Resolved, run_data: RunData, models: _Models, corpus: CorpusBatches | None, layouts: tuple[Layout, ...]
) -> dict[str, Any]:
    """What run.json says of data and models."""
    in_memory, teacher = resolved.in_memory, None if models.teacher is None else models.teacher.model
    parameters = {"student": _count(models.student), "trained": _count(models.student, trained=True)}
    return {
        "steps": run_data.steps,
        "data": run_data.data_facts,
        "corpus": None if corpus is None else corpus.blocks.facts(),
        "models": _fingerprints(resolved, run_data),
        "vocabulary": models.vocabulary,
        "layouts": [layout._asdict() for layout in layouts],
        **({"in_memory": in_memory.described()} if in_memory.models or in_memory.data else {}),
        "parameters": parameters | ({} if teacher is None else {"teacher": _count(teacher)}),
    }


def _fingerprints(resolved: Resolved, run_data: RunData) -> dict[str, str]:
    """Who the models of the run are."""
    student = resolved.settings.student
    found = {} if student.model is None else {"student": resolved.in_memory.fingerprint(student)}
    return found if run_data.teacher is None else {**found, "teacher": run_data.teacher.fingerprint()}


def _check_sharding(accelerator: Accelerator) -> None:
    """Raises DpkdError for ways of sharding that a step of dpkd does not go together with."""
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plugin.fsdp_version != 2:
        raise DpkdError("accelerate shards with FSDP 1; dpkd needs FSDP 2: accelerate launch --fsdp_version 2 ...")


def _count(model: nn.Module, *, trained: bool = False) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trained)


class _Models:
    """Student, teacher (where one is named) and their shared vocabulary."""

    def __init__(self, resolved: Resolved, accelerator: Accelerator, run_data: RunData, display: Display) -> None:
        settings, device, self.teacher = resolved.settings, accelerator.device, run_data.teacher
        self.autocasts = False
        if self.teacher is not None:
            # A student that starts from the teacher's layers takes them as they are stored.
            copied = settings.student.init == "layers"
            narrow = teacher_dtype(settings.train.precision, device)
            self.teacher.load(device, None if copied else narrow)
            # It then computes in that type all the same, as the student does.
            self.autocasts = copied and narrow is not None and settings.teacher.dtype == "auto"
        student = make_student(
            settings.student,
            teacher=None if self.teacher is None else self.teacher.model,
            device=device,
            seed=settings.seed,
            in_memory=resolved.in_memory,
        )
        if (again := settings.student.gradient_checkpointing) is not False:
            recompute_activations(student, selective=again == "selective")
        check_head(student)
        self.vocabulary = student.get_output_embeddings().weight.shape[0]
        if self.teacher is not None:
            shared = self.teacher.share(run_data.tokenizer, self.vocabulary)
            self.vocabulary = shared.size
            if shared.note:
                display.say(shared.note)
        reads = frozenset().union(*(objective.reads for objective in resolved.objectives))
        self.reference = None
        if REFERENCE_LOGPS & reads:
            # The student as it starts: a resumed run makes it anew, before it loads what was trained.
            self.reference = LocalTeacher.of(deepcopy(student), self.vocabulary, device)
        self.student = add_lora(student, settings.student.lora) if settings.student.lora else student
        if self.teacher is not None:
            self.teacher.join(self.student)
        self.student.train()

    def capture(self, display: Display) -> None:
        """Record the passes of the student and of the models that it learns from as CUDA graphs."""
        # A teacher that is the student's base runs the same layers, with the adapters switched off.
        others = [one for one in (self.teacher, self.reference) if one is not None and not one.of_student]
        for model in (self.student, *(one.model for one in others)):
            if model is not None:
                capture(causal_lm(model), display.say)

    def layouts(self, batch: BatchSettings, autocast: Context, *, may_loop: bool = True) -> tuple[Layout, ...]:
        """How sequences may become rows: what was asked for, as far as all models allow; the usual layout first.

        `may_loop`: on a CPU attention may go through the sequences of a row one by one, which a compiler cannot follow.
        Raises DpkdError when packing was asked for by name and a model cannot.
        """
        # A teacher with another tokenizer reads rows of its own.
        teacher = self.teacher.model if self.teacher is not None and self.teacher.measurable else None
        models = {"student": (self.student, autocast)}
        if teacher is not None:
            models["teacher"] = (teacher, autocast if self.autocasts else nullcontext)
        on_gpu = next(self.student.parameters()).device.type == "cuda"
        by_package = any(implementation(causal_lm(model)) in FLASH for model, _ in models.values())
        quick = all(_under(context, reads_packed_rows, causal_lm(model)) for model, context in models.values())
        packed = batch.packing == "on" or (batch.packing == "auto" and quick and (on_gpu or by_package))
        columns = ALIGNED if on_gpu and not by_package else 1
        usual = Layout(packed=packed, columns=columns)
        if packed:
            for who, (model, context) in models.items():
                if (reason := _under(context, why_not, model, usual)) is None:
                    continue
                if batch.packing == "on":
                    raise DpkdError(f"batch.packing: the {who} cannot read packed rows: {reason}. Leave it at auto.")
                usual, packed = usual._replace(packed=False), False
        loops = batch.packing == "auto" and may_loop and quick and not (packed or on_gpu)
        others = [Layout(packed=True)] if loops and worth_packing(self.student) else []
        # Attention that goes from sequence to sequence has no mask, with which alone they can share a prompt.
        others += [usual._replace(shared=True, packed=packed and not quick)] if batch.shared_prompts else []
        return usual, *(one for one in others if not any(_under(c, why_not, m, one) for m, c in models.values()))


def _under(context: Context, call: Callable[..., Any], *arguments: Any) -> Any:
    """What a call gives inside a context."""
    with context():
        return call(*arguments)


def _compile(
    resolved: Resolved,
    models: _Models,
    losses: dict[str, Any],
    steps: int,
    layouts: tuple[Layout, ...],
    accelerator: Accelerator,
    display: Display,
) -> None:
    """Compile the layers of both models, and losses that no kernel computes, where that is asked for or pays."""
    choice, in_memory, device = resolved.settings.train.compile, resolved.in_memory, accelerator.device
    teacher = None if models.teacher is None else models.teacher.model
    code = [code_of(model) for model in (models.student, teacher) if model is not None]
    if zero_config() is not None:
        return
    layers_too = choice == "on"
    losses_too = choice == "on"
    if choice == "auto" and device.type == "cuda":
        layers_too = not _graphs(resolved.settings, accelerator) and _pays(code, steps, in_memory)
        losses_too = steps >= WORTH_STEPS
    several = any(
        o.spec.family is Family.PAIR or o.text.student_sampling.num_generations > 1 for o in resolved.objectives
    )
    used = [layout for layout in layouts if several or not layout.shared]
    reasons: dict[str, str | None] = {}
    if layers_too:
        reasons["the student's layers"] = compile_checked(models.student, accelerator.autocast, used)
    if layers_too and teacher is not None:
        of_teacher = accelerator.autocast if models.autocasts else nullcontext
        reasons["the teacher's layers"] = compile_checked(teacher, of_teacher, used)
    if layers_too and not any(reasons.values()):
        in_memory.compiled.update(code)
    for objective in resolved.objectives if losses_too else ():
        loss = losses[objective.name]
        by_kernel = kl_sum_of(loss) is not None and why_not_fused(device.type) is None
        # A setting that follows the step would be compiled into the loss, and again at every step.
        if objective.spec.family is Family.PAIR or HIDDEN & objective.reads or objective.schedules or by_kernel:
            continue
        reasons[f"the loss {objective.spec.name}"] = compile_loss(
            loss, partial(_few_rows, objective.reads, device, models.vocabulary)
        )
    done = [what for what, reason in reasons.items() if reason is None]
    if done:
        display.say(f"compiled: {', '.join(done)} (train.compile)")
    for what, reason in reasons.items():
        if reason is not None:
            display.say(f"not compiled: {what}, {reason}")


def _graphs(settings: RunSettings, accelerator: Accelerator) -> bool:
    """Whether the passes of the models are recorded."""
    alone = accelerator.num_processes == 1 and zero_config() is None
    return settings.train.cuda_graphs == "auto" and accelerator.device.type == "cuda" and alone


def _few_rows(reads: frozenset[Signal], device: torch.device, vocabulary: int) -> Any:
    """Of the vocabulary of the run: code for a smaller one would be compiled in vain."""
    return sample_inputs(reads, device, vocabulary)[1].only(reads)


def _pays(code: Sequence[Hashable], steps: int, in_memory: InMemory) -> bool:
    """Whether the steps win back what compiling costs: those of all runs of this process, for they share the code."""
    return steps * in_memory.runs_left >= WORTH_STEPS or in_memory.compiled.issuperset(code)


def _losses(resolved: Resolved) -> dict[str, Any]:
    terms = resolved.settings.terms
    losses: dict[str, Any] = {o.name: o.spec.loss(o.config) for o in resolved.objectives}
    if terms.lm.weight > 0:
        losses["lm"] = LanguageModelling(LanguageModellingConfig())
    if terms.pretrain.weight > 0:
        losses["pretrain"] = LanguageModelling(LanguageModellingConfig(kd_ratio=terms.pretrain.kd_ratio))
    return losses


def _corpus(settings: RunSettings, tokenizer: Any, steps: int, display: Display) -> CorpusBatches | None:
    pretrain = settings.terms.pretrain
    if pretrain.weight == 0 or pretrain.corpus is None:
        return None
    blocks = read_corpus(pretrain.corpus, tokenizer)
    display.say(blocks.sentence())
    size = pretrain.batch_size or settings.train.batch_size
    return CorpusBatches(
        blocks, BatchSampler([len(b) for b in blocks], batch_size=size, steps=steps, seed=settings.seed)
    )
