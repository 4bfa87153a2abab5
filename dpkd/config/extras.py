"""The losses beside the main one (`terms.extra`), each with its settings, text and schedules, all checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dpkd.api import Family, LossConfig, LossSpec, SourceConfig, SourceSpec
from dpkd.config.aliases import renamed
from dpkd.config.layers import Layer, merge
from dpkd.config.objective import Objective, schedule_problems
from dpkd.config.problems import checked
from dpkd.config.settings import ExtraTerm
from dpkd.config.text import drop_outdated, loss_problems, own_settings, source_of
from dpkd.errors import DpkdError, SettingsError
from dpkd.plugins import Registry


def extra_objective(
    name: str, term: ExtraTerm, main: tuple[SourceSpec, SourceConfig] | None, registry: Registry
) -> tuple[Objective | None, list[str]]:
    """The loss beside the main one (with its source, where that is sound), and what is wrong, in sentences."""
    path = f"terms.extra.{name}"
    try:
        registered = registry.get(LossSpec, term.loss)
    except DpkdError as error:
        return None, [f"{path}.loss: {error}"]
    spec, problems = registered.spec, []
    config: LossConfig | None = None
    try:
        config = checked(spec.config, term.settings, f"{path}.settings")
        problems += schedule_problems(spec, config, term.schedules, f"{path}.schedules")
    except SettingsError as error:
        problems += error.problems
    shares = term.text is None and main is not None and _shares(spec, *main)
    if shares and main is not None:
        source, text = main
    else:
        try:
            source, text = own_text(spec, term.text or {}, f"{path}.text", registry)
        except SettingsError as error:
            return None, [*problems, *error.problems]
        problems += [f"{setting}: {why}" for setting, why in loss_problems(text, spec, f"{path}.text", registry)]
    if config is None:
        return None, problems
    return Objective(name, registered, config, term.weight, source, text, term.schedules, shares), problems


def own_text(
    spec: LossSpec, given: Mapping[str, Any], path: str, registry: Registry
) -> tuple[SourceSpec, SourceConfig]:
    """The source of a loss, and its settings: what the user gives over what the loss suggests.

    Raises SettingsError with a sentence for every mistake.
    """
    suggested = renamed(Layer(f"{spec.name}'s suggestions", {"text": spec.suggests.get("text", {})}))
    merged = merge([suggested, Layer("the user", {"text": given} if given else {})])
    try:
        source = source_of(merged.values.get("text"), spec.family, registry)
    except DpkdError as error:
        raise SettingsError([f"{path}.source: {error}"]) from error
    drop_outdated(merged, source, [suggested.name, "the user"])
    values, foreign = own_settings(merged.values.get("text", {}), source, registry)
    problems = [f"{path}.{key}: {why}" for key, why in foreign.items()]
    try:
        config = checked(source.config, values, path)
    except SettingsError as error:
        raise SettingsError([*problems, *error.problems]) from error
    if problems:
        raise SettingsError(problems)
    return source, config


def _shares(spec: LossSpec, source: SourceSpec, text: SourceConfig) -> bool:
    """Whether a loss can be taken from the responses that the main loss has."""
    alike = (spec.family is Family.PAIR) == source.config.pairs and spec.family is not Family.ROLLOUT
    return alike and set(text.writers) <= spec.accepts
