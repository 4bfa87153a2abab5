"""From settings to a sampler: which one draws, what it is asked for, under which seeds, and whether it can."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from dpkd.api import (
    Ability,
    Family,
    GenerationModel,
    Sampler,
    SamplerSpec,
    SamplingSettings,
    SamplingTask,
    SourceConfig,
    Text,
)
from dpkd.plugins import Registry


def open_sampler(registry: Registry, backend: str, settings: Mapping[str, Any], writer: GenerationModel) -> Sampler:
    """The sampler of a name (`text.backend`) under its own settings, for a model. The settings were checked before.

    Raises DpkdError when there is none of that name, or when it cannot begin.
    """
    spec = registry.get(SamplerSpec, backend).spec
    return spec.open(writer, spec.config.model_validate(settings))


def sampling_task(
    settings: SamplingSettings, prompts: Sequence[Sequence[int]], seeds: Sequence[int], **more: Any
) -> SamplingTask:
    """A task under some sampling settings; `more` as `SamplingTask` has it."""
    return SamplingTask(prompts, seeds, **settings.model_dump(), **more)


def response_seed(seed: int, period: int, example_id: str) -> int:
    """Seed of one response: a hash of run seed, refresh period and example."""
    digest = hashlib.sha256(f"{seed}/{period}/{example_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def sample_seeds(seed: int, period: int, example_id: str, count: int) -> list[int]:
    """Seeds of the responses to one example: the first is `response_seed`, so that more of them do not change it."""
    first = response_seed(seed, period, example_id)
    return [first, *(response_seed(first, number, "sample") for number in range(1, count))]


def prompt_seed(seed: int, prompt_ids: Sequence[int]) -> int:
    """Seed of the teacher's response to a prompt: the same prompt gets the same response wherever it stands."""
    return response_seed(seed, 0, ",".join(map(str, prompt_ids)))


def wanted_abilities(text: SourceConfig, family: Family, quantized: bool = False) -> dict[Ability, str]:
    """What a text asks of its sampler beyond plain text, with the setting that asks for it."""
    wanted: dict[Ability, str] = {}
    writers: Collection[Text] = text.writers
    if Text.TEACHER in writers and quantized:
        wanted[Ability.QUANTIZED] = "text by a teacher with teacher.quantization"
    if Text.STUDENT not in writers:
        return wanted
    for name in ("teacher_mix", "teacher_veto"):
        if getattr(text.student_sampling, name) > 0:
            wanted[Ability.TEACHER_MIX] = f"text.{name} above 0"
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
