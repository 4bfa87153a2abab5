"""Puts the parts of a run together: data, models, losses, writers, optimiser. Cheap checks come first."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dpkd.api import Family
from dpkd.config.resolve import Resolved
from dpkd.config.settings import RunSettings
from dpkd.data.corpus import read_corpus
from dpkd.data.order import Schedule
from dpkd.data.tokenise import TokenisedData
from dpkd.engine.auxiliary import LanguageModelling, LanguageModellingConfig
from dpkd.engine.distiller import Distiller
from dpkd.engine.optimiser import make_optimiser
from dpkd.engine.preparation import Prepared, prepare, teacher_writes
from dpkd.engine.progress import Display
from dpkd.engine.step import Stepper
from dpkd.engine.streams import LM_READS, Corpus, StreamBuilder
from dpkd.models.head import check_head
from dpkd.models.loading import load_model
from dpkd.models.tokenizers import shared_vocabulary, tokenizer_fingerprint
from dpkd.students.initialise import make_student
from dpkd.students.lora import add_lora
from dpkd.teachers.live import LiveTeacher
from dpkd.text.pens import Crew, StudentPen, TeacherPen
from dpkd.text.store import ResponseStore, default_folder, model_fingerprint
from dpkd.text.writers import Writers

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["Assembly", "assemble"]


@dataclass
class Assembly:
    """A run, ready to go."""

    tokenizer: Any
    data: TokenisedData
    teacher: LiveTeacher | None
    stepper: Stepper
    writers: Writers
    builder: StreamBuilder
    facts: dict[str, Any]


def assemble(resolved: Resolved, accelerator: Accelerator, display: Display) -> Assembly:
    """Load everything that a run needs.

    Raises DpkdError when models, tokenizers or data do not fit together.
    """
    settings = resolved.settings
    prepared = prepare(resolved, display)
    tokenizer, data, steps = prepared.tokenizer, prepared.data, prepared.steps
    corpus = _corpus(settings, tokenizer, steps, display)
    models = _Models(resolved, accelerator, prepared, display)
    lengths = [len(p.prompt_ids) + len(p.response_ids) for p in data.prompts]
    schedule = Schedule(
        lengths, batch_size=settings.train.batch_size, steps=steps, seed=settings.seed,
        refresh=settings.text.refresh, every=settings.text.every, inner_epochs=settings.text.inner_epochs,
    )  # fmt: skip
    losses = _losses(resolved)
    distiller = Distiller(
        models.student, losses, vocabulary=models.vocabulary, chunk_mib=settings.train.chunk_mib,
        reward_scale=float(getattr(resolved.loss_config, "beta", 1.0)),
    ).to(accelerator.device)  # fmt: skip
    optimiser = make_optimiser(distiller, settings.train)
    distiller, optimiser = accelerator.prepare(distiller, optimiser)
    stepper = Stepper(
        accelerator, distiller, optimiser, models.teacher, tokenizer.pad_token_id,
        settings.train.micro_batch_size, settings.train.clip,
    )  # fmt: skip
    writers = _writers(resolved, models, prepared, schedule, accelerator, display, losses["main"])
    builder = StreamBuilder(
        resolved.loss.family, resolved.loss.signals(resolved.loss_config), settings.terms,
        losses["pretrain"].reads() if "pretrain" in losses else LM_READS, data.prompts,
        corpus,
    )  # fmt: skip
    facts = {
        "steps": steps,
        "data": prepared.data_facts,
        "corpus": None if corpus is None else _corpus_facts(corpus),
        "models": {
            who: model_fingerprint(model.model, model.revision)
            for who, model in (("student", settings.student), ("teacher", settings.teacher))
            if model.model is not None
        },
        "vocabulary": models.vocabulary,
        "parameters": {"student": _count(models.student), "trained": _count(models.student, trained=True)},
    }
    if models.teacher is not None:
        facts["parameters"]["teacher"] = _count(models.teacher.model)
    return Assembly(tokenizer, data, models.teacher, stepper, writers, builder, facts)


def _count(model: nn.Module, *, trained: bool = False) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trained)


class _Models:
    """Student, teacher (where one is named) and their shared vocabulary."""

    def __init__(self, resolved: Resolved, accelerator: Accelerator, prepared: Prepared, display: Display) -> None:
        settings, device = resolved.settings, accelerator.device
        teacher = _load_teacher(settings, device) if settings.teacher.model is not None else None
        student = make_student(settings.student, teacher=teacher, device=device, seed=settings.seed)
        if settings.student.gradient_checkpointing:
            student.gradient_checkpointing_enable({"use_reentrant": False})
            student.enable_input_require_grads()  # frozen embeddings (LoRA) would cut the graph
        check_head(student)
        self.vocabulary = student.get_output_embeddings().weight.shape[0]
        self.teacher = None
        if teacher is not None:
            shared = shared_vocabulary(
                prepared.tokenizer, prepared.teacher_tokenizer, self.vocabulary,
                teacher.get_output_embeddings().weight.shape[0],
            )  # fmt: skip
            self.vocabulary = shared.size
            if shared.note:
                display.say(shared.note)
            self.teacher = LiveTeacher(teacher, self.vocabulary, device)
        self.student = add_lora(student, settings.student.lora) if settings.student.lora else student
        self.student.train()


def _load_teacher(settings: RunSettings, device: torch.device) -> Any:
    model = load_model(settings.teacher, device=torch.device(settings.teacher.device or device), dtype=None)
    check_head(model)
    return model


def _losses(resolved: Resolved) -> dict[str, Any]:
    terms = resolved.settings.terms
    losses: dict[str, Any] = {"main": resolved.loss.loss(resolved.loss_config)}
    if terms.lm.weight > 0:
        losses["lm"] = LanguageModelling(LanguageModellingConfig())
    if terms.pretrain.weight > 0:
        losses["pretrain"] = LanguageModelling(LanguageModellingConfig(kd_ratio=terms.pretrain.kd_ratio))
    return losses


def _writers(
    resolved: Resolved, models: _Models, prepared: Prepared, schedule: Schedule,
    accelerator: Accelerator, display: Display, loss: Any,
) -> Writers:  # fmt: skip
    settings, tokenizer, data = resolved.settings, prepared.tokenizer, prepared.data
    eos_ids = frozenset({tokenizer.eos_token_id})
    crew = _crew(accelerator)
    common: Mapping[str, Any] = {
        "prompts": data.prompts, "eos_ids": eos_ids, "pad_id": tokenizer.pad_token_id,
        "vocabulary": models.vocabulary, "seed": settings.seed, "crew": crew, "context": prepared.context,
    }  # fmt: skip
    student = StudentPen(
        models.student, settings=settings.text, teacher=models.teacher,
        loss=loss if resolved.loss.family is Family.ROLLOUT else None, **common,
    )  # fmt: skip
    teacher = _teacher_pen(settings, models, tokenizer, display, common) if teacher_writes(resolved) else _no_teacher
    return Writers(
        settings.text, resolved.loss.family, data.prompts, schedule,
        seed=settings.seed, eos_ids=eos_ids, student=student, teacher=teacher,
    )  # fmt: skip


def _teacher_pen(
    settings: RunSettings, models: _Models, tokenizer: Any, display: Display, common: Mapping[str, Any]
) -> TeacherPen:
    # Settings without a teacher are refused before.
    assert models.teacher is not None
    assert settings.teacher.model is not None
    store = ResponseStore.open(
        Path(settings.text.store) if settings.text.store else default_folder(),
        model_fingerprint=model_fingerprint(settings.teacher.model, settings.teacher.revision),
        # Which ids may be drawn decides the responses too.
        tokenizer_fingerprint=f"{tokenizer_fingerprint(tokenizer)}/{models.vocabulary}",
        sampling=settings.text.teacher_sampling,
        seed=settings.seed,
    )
    return TeacherPen(
        models.teacher, sampling=settings.text.teacher_sampling, store=store,
        decode=lambda ids: tokenizer.decode(ids, skip_special_tokens=True), progress=display.pulse, **common,
    )  # fmt: skip


def _no_teacher(indices: Any) -> Any:
    raise AssertionError("the plan lets no run without a teacher ask for its text")


def _crew(accelerator: Accelerator) -> Crew:
    if accelerator.num_processes == 1:
        return Crew()
    from accelerate.utils import gather_object

    gather: Callable[[list[Any]], list[Any]] = gather_object
    return Crew(accelerator.process_index, accelerator.num_processes, gather)


def _corpus(settings: RunSettings, tokenizer: Any, steps: int, display: Display) -> Corpus | None:
    pretrain = settings.terms.pretrain
    if pretrain.weight == 0 or pretrain.corpus is None:
        return None
    blocks = read_corpus(pretrain.corpus, tokenizer)
    display.say(blocks.sentence())
    size = pretrain.batch_size or settings.train.batch_size
    return Corpus(blocks, Schedule([len(b) for b in blocks], batch_size=size, steps=steps, seed=settings.seed))


def _corpus_facts(corpus: Corpus) -> dict[str, Any]:
    """What run.json says of the plain text."""
    blocks = corpus.blocks
    return {
        "path": blocks.source, "fingerprint": blocks.fingerprint, "documents": blocks.documents, "blocks": len(blocks),
        "left_over_tokens": blocks.left_over,
    }  # fmt: skip
