"""From settings to a sampler: which one draws, what it is asked for, and whether it can."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dpkd.api import Ability, Family, GenerationModel, Sampler, SamplerSpec, SamplingTask, Text
from dpkd.plugins import Registry
from dpkd.rollout.settings import SamplingSettings, TextSettings


def open_sampler(registry: Registry, text: TextSettings, writer: GenerationModel) -> Sampler:
    """The sampler that a text's settings name, for a model. The settings were checked before.

    Raises DpkdError when there is none of that name, or when it cannot begin.
    """
    spec = registry.get(SamplerSpec, text.backend).spec
    return spec.open(writer, spec.config.model_validate(text.backend_settings))


def sampling_task(
    settings: SamplingSettings, prompts: Sequence[Sequence[int]], seeds: Sequence[int], **more: Any
) -> SamplingTask:
    """A task under some sampling settings; `more` as `SamplingTask` has it."""
    return SamplingTask(prompts, seeds, **settings.model_dump(), **more)


def wanted_abilities(
    text: TextSettings, writers: set[Text], family: Family, quantized: bool = False
) -> dict[Ability, str]:
    """What a text asks of its sampler beyond plain text, with the setting that asks for it."""
    wanted: dict[Ability, str] = {}
    if Text.TEACHER in writers and quantized:
        wanted[Ability.QUANTIZED] = "text by a teacher with teacher.quantization"
    if Text.STUDENT not in writers:
        return wanted
    if text.teacher_mix > 0:
        wanted[Ability.TEACHER_MIX] = "text.teacher_mix above 0"
    if text.teacher_veto > 0:
        wanted[Ability.TEACHER_MIX] = "text.teacher_veto above 0"
    if family is Family.ROLLOUT:
        sampling = text.sampling
        wanted[Ability.LOGPS] = "a rollout loss"
        if (sampling.temperature, sampling.top_p, sampling.top_k) != (1.0, 1.0, 0):
            wanted[Ability.FILTERED_LOGPS] = "a rollout loss with temperature, top_p or top_k in text.sampling"
    return wanted


def refusals(spec: SamplerSpec, wanted: dict[Ability, str]) -> list[str]:
    """Why a sampler cannot do what is wanted, a sentence for each."""
    missing = spec.missing()
    return [
        *([f"{spec.name} cannot be used here: {missing}"] if missing else []),
        *(
            f"{spec.name} has no {ability.value}, which {setting} needs: {spec.lacks[ability]}; "
            "change that, or choose another sampler (hf can do everything)"
            for ability, setting in wanted.items()
            if ability in spec.lacks
        ),
    ]
