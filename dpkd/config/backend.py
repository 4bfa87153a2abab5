"""Whether the samplers that a run names are there, and can do what the run asks of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from dpkd.api import Family, LossSpec, SamplerSpec, Text
from dpkd.config.objective import Objective, text_writers
from dpkd.config.problems import checked
from dpkd.config.settings import RunSettings
from dpkd.errors import DpkdError, SettingsError
from dpkd.plugins import Registry
from dpkd.rollout.generator import refusals, wanted_abilities
from dpkd.rollout.settings import TextSettings


def backend_problems(
    settings: RunSettings, spec: LossSpec, extras: Sequence[Objective], registry: Registry
) -> list[str]:
    """What is wrong with the sampler of each text of a run, in sentences."""
    return [
        problem
        for path, text, family in _texts(settings, spec, extras)
        for problem in _problems(path, text, family, settings.teacher.quantization != "none", registry)
    ]


def _texts(
    settings: RunSettings, spec: LossSpec, extras: Sequence[Objective]
) -> Iterator[tuple[str, TextSettings, Family]]:
    yield "text", settings.text, spec.family
    for extra in extras:
        if extra.text is not None:
            yield f"terms.extra.{extra.name}.text", extra.text, extra.spec.family


def _problems(path: str, text: TextSettings, family: Family, quantized: bool, registry: Registry) -> list[str]:
    try:
        sampler = registry.get(SamplerSpec, text.backend).spec
    except DpkdError as error:
        return [f"{path}.backend: {error}"]
    try:
        checked(sampler.config, text.backend_settings, f"{path}.backend_settings")
    except SettingsError as error:
        return list(error.problems)
    writers = set(text_writers(text, family).values())
    if not writers & {Text.STUDENT, Text.TEACHER}:
        return []
    wanted = wanted_abilities(text, writers, family, quantized)
    return [f"{path}.backend: {reason}" for reason in refusals(sampler, wanted)]
