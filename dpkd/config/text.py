"""The block `text`: the source that it names, that source's own settings, and what they need beside the block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dpkd.api import Family, LossSpec, MetricSpec, SamplerSpec, Signal, SourceConfig, SourceSpec
from dpkd.config.layers import Merged, drop
from dpkd.config.objective import Objective
from dpkd.config.problems import checked
from dpkd.config.settings import RunSettings
from dpkd.errors import DpkdError, SettingsError
from dpkd.plugins import Registry
from dpkd.rollout.generator import refusals, wanted_abilities
from dpkd.rollout.reward import why_no_reward


def source_of(values: Any, family: Family, registry: Registry) -> SourceSpec:
    """The source that a block names; where it names none, that which suits the loss.

    Raises DpkdError where no source has that name.
    """
    fitting = "pairs" if family is Family.PAIR else "dataset"
    name = values.get("source", fitting) if isinstance(values, Mapping) else fitting
    return registry.get(SourceSpec, str(name)).spec


def drop_outdated(merged: Merged, spec: SourceSpec, order: Sequence[str]) -> None:
    """Drop settings that the source does not have, from the layers below the one that chose the source.

    `order` has the names of the layers: `text.source=student` leaves behind the mix that a loss suggests.
    """
    rank = {name: number for number, name in enumerate(order)}
    chosen = rank.get(merged.provenance.get("text.source", ""), -1)
    block = merged.values.get("text")
    for key in [k for k in block if k not in spec.config.model_fields] if isinstance(block, dict) else []:
        layers = [name for path, name in merged.provenance.items() if f"{path}.".startswith(f"text.{key}.")]
        if all(rank.get(name, -1) < chosen for name in layers):
            drop(merged, f"text.{key}")


def own_settings(values: Any, spec: SourceSpec, registry: Registry) -> tuple[Any, dict[str, str]]:
    """The block without settings that only other sources have, and a sentence for each of these.

    A default of another source says nothing: it is left out without a word.
    """
    if not isinstance(values, Mapping):
        return values, {}
    own, foreign = dict(values), {}
    for key in [key for key in values if key not in spec.config.model_fields]:
        owners = {
            name: other.spec.config.model_fields[key]
            for name, other in registry.all(SourceSpec).items()
            if key in other.spec.config.model_fields
        }
        if not owners:
            continue
        given = own.pop(key)
        defaults = [field.get_default(call_default_factory=True) for field in owners.values()]
        if given not in [list(value) if isinstance(value, tuple) else value for value in defaults]:
            have = "has" if len(owners) == 1 else "have"
            foreign[key] = f"the source {spec.name} has no such setting ({', '.join(owners)} {have} it)"
    return own, foreign


def loss_problems(text: SourceConfig, spec: LossSpec, path: str, registry: Registry) -> list[tuple[str, str]]:
    """Why a loss cannot be computed on the responses of a source: settings, each with a sentence."""
    if (spec.family is Family.PAIR) != text.pairs:
        others = [n for n, other in registry.all(SourceSpec).items() if other.spec.config.pairs is not text.pairs]
        takes = "two responses to each prompt" if spec.family is Family.PAIR else "single responses"
        gives = "pairs" if text.pairs else "single ones"
        advice = f"choose one of {', '.join(others)}"
        return [
            (f"{path}.source", f"{spec.name} is a {spec.family} loss on {takes}, {text.source} gives {gives}: {advice}")
        ]
    accepted = ", ".join(sorted(spec.accepts))
    return [
        (f"{path}.{setting}", f"the loss {spec.name} takes text by {accepted}, not by {writer.value}")
        for writer, setting in text.writers.items()
        if writer not in spec.accepts
    ]


def teacher_reasons(text: SourceConfig, path: str = "text") -> list[str]:
    """What a source needs the teacher's model for, beside its responses."""
    return [f"{path}.{setting} {why}" for setting, why in text.teacher_uses().items()]


def dev_problems(settings: RunSettings, objectives: Mapping[str, Objective]) -> list[str]:
    """What a source lacks that follows the loss on held-out rows; `objectives` by the path of their text."""
    lacking = []
    if settings.dev.path is None:
        lacking.append("held-out rows (dev.path, and dev.every for how often)")
    if not settings.teacher.in_memory:
        lacking.append("the teacher's model, with which the loss on them is taken (--teacher)")
    return [
        f"{path}.source: {objective.text.source} follows the loss on held-out text, and needs {' and '.join(lacking)}"
        for path, objective in objectives.items()
        if objective.text.follows_dev and lacking
    ]


def reward_problems(objectives: Mapping[str, Objective], registry: Registry) -> list[str]:
    """Whether the losses that read rewards get some, and nobody else; `objectives` by the path of their text."""
    found = {path: _why_no_reward(objective, registry) for path, objective in objectives.items()}
    return [f"{path}.reward: {why}" for path, why in found.items() if why is not None]


def _why_no_reward(objective: Objective, registry: Registry) -> str | None:
    name, reads = objective.text.student_sampling.reward, Signal.REWARDS in objective.reads
    if not reads:
        return None if name is None else f"{objective.spec.name} reads no reward (Signal.REWARDS): leave it out"
    if name is None:
        fit = [metric for metric, one in registry.all(MetricSpec).items() if why_no_reward(one.spec) is None]
        return f"{objective.spec.name} reads the reward of each response; name a metric: {', '.join(fit)}"
    try:
        return why_no_reward(registry.get(MetricSpec, name).spec)
    except DpkdError as error:
        return str(error)


def sampler_problems(settings: RunSettings, objectives: Mapping[str, Objective], registry: Registry) -> list[str]:
    """Whether the samplers of a run are there, and can do what it asks of them; in sentences."""
    quantized = settings.teacher.quantization != "none"
    return [
        problem
        for path, objective in objectives.items()
        for problem in _sampler_problems(path, objective.text, objective.spec.family, quantized, registry)
    ]


def _sampler_problems(path: str, text: SourceConfig, family: Family, quantized: bool, registry: Registry) -> list[str]:
    try:
        sampler = registry.get(SamplerSpec, text.backend).spec
    except DpkdError as error:
        return [f"{path}.backend: {error}"]
    try:
        checked(sampler.config, text.backend_settings, f"{path}.backend_settings")
    except SettingsError as error:
        return list(error.problems)
    if not text.draws:
        return []
    return [f"{path}.backend: {reason}" for reason in refusals(sampler, wanted_abilities(text, family, quantized))]
