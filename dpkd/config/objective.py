"""The losses of a run: the main one and those beside it, each with its settings, text and schedules, all checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from dpkd.api import Family, LossConfig, LossSpec, Signal, Text
from dpkd.config.layers import Layer, merge
from dpkd.config.problems import checked
from dpkd.config.settings import ExtraTerm, RunSettings, ScheduleSettings
from dpkd.errors import DpkdError, SettingsError
from dpkd.plugins import RegisteredLoss, Registry
from dpkd.rollout.settings import TextSettings


@dataclass(frozen=True)
class Objective:
    """One loss of a run. Where it `shares_text`, it takes the responses of the main loss, and `text` is theirs."""

    name: str  # main, or what the user calls it
    registered: RegisteredLoss
    config: LossConfig
    weight: float
    text: TextSettings
    schedules: Mapping[str, ScheduleSettings]
    shares_text: bool = False

    @property
    def spec(self) -> LossSpec:
        return self.registered.spec

    @property
    def writers(self) -> dict[str, Text]:
        """Setting → writer, for all who write the responses that it is taken of."""
        return text_writers(self.text, self.spec.family)

    @property
    def reads(self) -> frozenset[Signal]:
        """Everything that it reads at any point of its schedules."""
        ends = [{name: getattr(s, end) for name, s in self.schedules.items()} for end in ("start", "end")]
        middle = {name: (s.start + s.end) / 2 for name, s in self.schedules.items()}
        configs = [self.config.model_copy(update=update) for update in ({}, *ends, middle)]
        return frozenset().union(*(self.spec.signals(config) for config in configs))


def text_writers(text: TextSettings, family: Family) -> dict[str, Text]:
    """Setting → writer, for all writers of a text."""
    if family is Family.PAIR:
        pairs = text.pairs
        return {"pairs.chosen": Text(pairs.chosen), "pairs.rejected": Text(pairs.rejected)}
    if text.source == "mixed":
        return {f"mix.{writer.value}": writer for writer, share in text.mix.items() if share > 0}
    if text.source == "each":
        return {f"each.{writer.value}": writer for writer in text.each}
    if text.source == "adaptive":
        return {"adaptive.dataset": Text.DATASET, "adaptive.student": Text.STUDENT}
    return {"source": Text(text.source)}


def main_objective(settings: RunSettings, registered: RegisteredLoss, config: LossConfig) -> Objective:
    """The main loss, as one of the losses of a run."""
    return Objective("main", registered, config, settings.terms.main, settings.text, settings.schedules)


def samples_problem(text: TextSettings, family: Family, path: str) -> list[str]:
    """What is wrong with several samples per prompt, where they cannot be."""
    if text.num_generations == 1:
        return []
    if family is Family.PAIR:
        return [f"{path}.num_generations: a pair has one response by each writer, so it must be 1"]
    if text.source not in ("student", "mixed") or Text.STUDENT not in text_writers(text, family).values():
        return [f"{path}.num_generations: is used only where the student writes; set {path}.source=student or mixed"]
    return []


def extra_objective(
    name: str, term: ExtraTerm, given: Any, settings: RunSettings, main: LossSpec | None, registry: Registry
) -> tuple[Objective | None, list[str]]:
    """The loss beside the main one, and what is wrong with it, in sentences. `given` is what the user wrote."""
    path = f"terms.extra.{name}"
    try:
        registered = registry.get(LossSpec, term.loss)
    except DpkdError as error:
        return None, [f"{path}.loss: {error}"]
    problems: list[str] = []
    config = _config(registered.spec, term.settings, path, problems)
    text = _own_text(registered.spec, given, settings, main, path, problems)
    if text is not None:
        accepted = ", ".join(sorted(registered.spec.accepts))
        problems += [
            f"{path}.text.{where}: the loss {term.loss} takes text by {accepted}, not by {writer.value}"
            for where, writer in text_writers(text, registered.spec.family).items()
            if writer not in registered.spec.accepts
        ]
        problems += samples_problem(text, registered.spec.family, f"{path}.text")
    if config is None:
        return None, problems
    problems += schedule_problems(registered.spec, config, term.schedules, f"{path}.schedules")
    shares = text is None
    own = settings.text if text is None else text
    return Objective(name, registered, config, term.weight, own, term.schedules, shares), problems


def _config(spec: LossSpec, values: Mapping[str, Any], path: str, problems: list[str]) -> LossConfig | None:
    try:
        return checked(spec.config, values, f"{path}.settings")
    except SettingsError as error:
        problems += error.problems
        return None


def _own_text(
    spec: LossSpec, given: Any, settings: RunSettings, main: LossSpec | None, path: str, problems: list[str]
) -> TextSettings | None:
    """Its text: what the user says over what the loss suggests; None where the main loss's text fits."""
    own = given.get("text") if isinstance(given, Mapping) else None
    if own is None and main is not None and _shares(spec, settings, main):
        return None
    suggested = {"text": spec.suggests.get("text", {})}
    merged = merge([Layer("suggested", suggested), Layer("given", {"text": own or {}})])
    try:
        return TextSettings.model_validate(merged.values.get("text", {}))
    except ValidationError as error:
        problems += [f"{path}.text: {problem['msg'].removeprefix('Value error, ')}" for problem in error.errors()]
        return None


def _shares(spec: LossSpec, settings: RunSettings, main: LossSpec) -> bool:
    """Whether a loss can be taken from the responses that the main loss has."""
    alike = (spec.family is Family.PAIR) == (main.family is Family.PAIR) and spec.family is not Family.ROLLOUT
    return alike and set(text_writers(settings.text, main.family).values()) <= spec.accepts


def schedule_problems(
    spec: LossSpec, config: LossConfig, schedules: Mapping[str, ScheduleSettings], path: str
) -> list[str]:
    """What is wrong with schedules: settings that do not exist, are no numbers, or leave their range."""
    problems = []
    for name, schedule in schedules.items():
        value = getattr(config, name, None) if name in spec.config.model_fields else None
        numeric = [f for f in spec.config.model_fields if _is_number(getattr(config, f))]
        if not _is_number(value):
            known = ", ".join(numeric) or "it has none"
            problems.append(f"{path}.{name}: {spec.name} has no numeric setting of that name ({known})")
            continue
        for end in ("start", "end"):
            try:
                spec.config.model_validate({**config.model_dump(), name: getattr(schedule, end)})
            except ValidationError as error:
                what = error.errors()[0]["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
                problems.append(f"{path}.{name}.{end}: should be {what} (got {getattr(schedule, end)})")
    return problems


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
