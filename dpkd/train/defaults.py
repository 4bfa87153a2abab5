"""Defaults that depend on what is trained, and what is worth knowing before any weight is loaded."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from dpkd.api.teachers import Teacher
from dpkd.config.problems import checked
from dpkd.config.resolve import Resolved
from dpkd.config.settings import RunSettings, TrainSettings
from dpkd.config.teacher import make_teacher
from dpkd.models.device import device_of, memory_of, teacher_dtype
from dpkd.models.loading import count_parameters
from dpkd.models.optimizers import state_bytes
from dpkd.models.quantization import check_quantization
from dpkd.models.sharding import sharding
from dpkd.models.student_init import student_config
from dpkd.train.memory import FLOAT, meta_student, student_bytes
from dpkd.train.progress import Display

GIB = 2**30
# Peak rates by the student's parameters, for all weights and for adapters. Below 200 M: the published recipes
# for GPT-2 (MiniLLM, DPKD). Above: those of instruction tuning, and ten times as much for adapters (LoRA).
_RATES = ((200e6, 5e-4, 1e-3), (1e9, 5e-5, 5e-4), (float("inf"), 1e-5, 2e-4))


def with_defaults(resolved: Resolved, display: Display) -> Resolved:
    """The settings with `train.lr` chosen by what is trained, where neither the user nor the loss gives one.

    Reads the models' configurations and no weights. Says the rate and its reason, and warns about a teacher smaller
    than the student and about models that are larger than the memory. Raises DpkdError when a device is missing.
    """
    settings = resolved.settings
    device = device_of(settings.train.device)
    check_quantization(settings.student)
    teacher = make_teacher(settings.teacher, resolved.registry, resolved.in_memory)
    config = student_config(settings.student, None if teacher is None else teacher.config, resolved.in_memory)
    size = count_parameters(config)
    teacher_size = 0 if teacher is None or teacher.config is None else count_parameters(teacher.config)
    for line in _warnings(size, teacher_size, _least_bytes(settings, config, teacher, device), device):
        display.say(f"warning: {line}")
    if "train.lr" in resolved.provenance:
        return resolved
    lora = settings.student.lora is not None
    lr = default_rate(size, lora=lora)
    what = "adapters on" if lora else "all weights of"
    reason = f"default for {what} {_millions(size)} parameters"
    display.say(f"learning rate: {lr:g}, the {reason} (train.lr)")
    train = checked(TrainSettings, {**settings.train.model_dump(), "lr": lr}, "train")
    return replace(
        resolved,
        settings=settings.model_copy(update={"train": train}),
        provenance={**resolved.provenance, "train.lr": reason},
    )


def default_rate(parameters: int, *, lora: bool) -> float:
    """The peak learning rate for a student of so many parameters.

    >>> default_rate(124_000_000, lora=False), default_rate(494_000_000, lora=True)
    (0.0005, 0.0005)
    """
    return next(adapters if lora else full for limit, full, adapters in _RATES if parameters < limit)


def _millions(count: int) -> str:
    return f"{count / 1e6:,.0f} M" if count >= 10e6 else f"{count / 1e6:.2g} M"


def _least_bytes(settings: RunSettings, config: Any, teacher: Teacher | None, device: torch.device) -> float:
    """What weights, gradients and optimizer state need."""
    student = meta_student(settings, config)
    parameters = sum(p.numel() for p in student.parameters())
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
    state = state_bytes(student, settings.train.optimizer, settings.train.own_optimizer_settings)
    shards, weights = sharding(), student_bytes(settings, config, parameters)
    needed = shards.held("weights", weights) + shards.held("gradients", FLOAT * trained)
    needed += shards.held("optimizer", state + FLOAT * trained * shards.copies)
    if teacher is not None and settings.teacher.device is None:
        needed += teacher.weight_bytes(teacher_dtype(settings.train.precision, device))
    return needed


def _warnings(student: int, teacher: int, needed: float, device: torch.device) -> list[str]:
    """Given parameters of both models (of the teacher 0 where unknown), and the bytes that a run needs at least."""
    found = []
    if 0 < teacher < student:
        found.append(
            f"the teacher ({_millions(teacher)} parameters) is smaller than the student "
            f"({_millions(student)}): are --teacher and --student exchanged?"
        )
    memory = memory_of(device)
    if memory is not None and needed > memory:
        found.append(
            f"weights, gradients and optimizer state need at least {needed / GIB:.1f} GiB, and the {device.type} "
            f"has {memory / GIB:.1f} GiB. Less memory: --set student.lora.r=16, --set train.optimizer=adamw_8bit, "
            "--set teacher.quantization=4bit, or a store of the teacher's log-probs (dpkd cache)"
        )
    return found
