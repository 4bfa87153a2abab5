"""From layers to the settings of a run: everything is checked here, once, and all mistakes are reported together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from dpkd.api import Family, LossConfig, LossSpec, TeacherAccess, Text
from dpkd.config.backend import backend_problems
from dpkd.config.layers import Layer, Merged, drop, get_path, merge, suggestion_layer
from dpkd.config.memory import memory_problems
from dpkd.config.objective import (
    Objective,
    extra_objective,
    main_objective,
    samples_problem,
    schedule_problems,
    text_writers,
)
from dpkd.config.problems import all_paths, sentences
from dpkd.config.settings import RunSettings
from dpkd.config.text_checks import adaptive_problems, sampling_reasons
from dpkd.errors import DpkdError, SettingsError
from dpkd.models.in_memory import InMemory
from dpkd.plugins import RegisteredLoss, Registry
from dpkd.teachers.store_check import why_not
from dpkd.teachers.store_manifest import read_manifest

ModelT = TypeVar("ModelT", bound=BaseModel)


@dataclass(frozen=True)
class Resolved:
    """Checked settings, the loss with its own checked settings, and where each value came from.

    `registry` has the plugins that other settings name, such as samplers. `given` has the models and rows that are in
    memory; the settings have names for them.
    """

    settings: RunSettings
    registered: RegisteredLoss
    loss_config: LossConfig
    provenance: dict[str, str]
    registry: Registry
    extras: tuple[Objective, ...] = ()
    given: InMemory = field(default_factory=InMemory)

    @property
    def main(self) -> Objective:
        """The main loss, as one of the losses of the run."""
        return main_objective(self.settings, self.registered, self.loss_config)

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """The main loss, then those beside it."""
        return (self.main, *self.extras)

    @property
    def loss(self) -> LossSpec:
        return self.registered.spec

    @property
    def plugin(self) -> str:
        """Distribution and version that the loss came from."""
        return f"{self.registered.distribution} {self.registered.version}"

    def as_dict(self) -> dict[str, Any]:
        """All settings that the run uses, as a file of settings would have them."""
        loss = {"name": self.loss.name, **self.loss_config.model_dump(mode="json")}
        unused = {"source", "mix"} if self.loss.family is Family.PAIR else {"pairs"}
        return {"loss": loss, **self.settings.model_dump(mode="json", exclude={"text": unused})}


def resolve(layers: Sequence[Layer], registry: Registry, given: InMemory | None = None) -> Resolved:
    """Merge and check the layers; `given` has what they name and a caller has in memory.

    Raises SettingsError with a sentence for every mistake in any layer, in the loss's settings, and between them.
    """
    merged = merge(layers)
    problems: list[str] = []
    registered = _registered(merged, registry, problems)
    if registered is not None:
        merged = merge([suggestion_layer(registered.spec.name, registered.spec.suggests), *layers])
        _leave_set_values_alone(merged, registered.spec.name)
    loss_values = merged.values.pop("loss", {})
    known = [*all_paths(RunSettings), "loss.name"]
    if registered is not None:
        known += all_paths(registered.spec.config, "loss.")
    settings = _validated(RunSettings, merged.values, merged, known, problems)
    sound = settings or _without_mistakes(merged.values)
    damaged = _damaged(merged.values)
    merged.values["loss"] = (
        {k: v for k, v in loss_values.items() if k != "name"} if isinstance(loss_values, dict) else {}
    )
    config = None
    if registered is not None:
        config = _validated(registered.spec.config, merged.values["loss"], merged, known, problems, "loss.")
    extras: list[Objective] = []
    if sound is not None:
        spec = registered.spec if registered else None
        terms = get_path(merged.values, "terms.extra") or {}
        for name, term in sound.terms.extra.items():
            extra, found = extra_objective(name, term, terms.get(name), sound, spec, registry)
            problems += found
            extras += [extra] if extra is not None else []
        main = None
        if registered is not None and config is not None:
            problems += schedule_problems(registered.spec, config, sound.schedules, "schedules")
            main = main_objective(sound, registered, config)
        problems += _cross_checks(sound, spec, config, merged, damaged, main, extras, registry)
        problems += memory_problems(sound, merged, given or InMemory())
    if problems:
        raise SettingsError(problems)
    assert settings is not None
    assert registered is not None
    assert config is not None
    return Resolved(settings, registered, config, dict(merged.provenance), registry, tuple(extras), given or InMemory())


def _leave_set_values_alone(merged: Merged, loss: str) -> None:
    """A setting of the loss that the user gives does not follow a schedule that the loss only suggests."""
    suggested, given = f"{loss}'s suggestions", merged.values.get("loss")
    schedules = merged.values.get("schedules")
    if not isinstance(schedules, dict) or not isinstance(given, dict):
        return
    for name in list(schedules):
        if name in given and merged.layer_of(f"schedules.{name}") == suggested:
            drop(merged, f"schedules.{name}")


def _registered(merged: Merged, registry: Registry, problems: list[str]) -> RegisteredLoss | None:
    block = merged.values.get("loss")
    name = block.get("name") if isinstance(block, dict) else None
    if not isinstance(name, str):
        given = (
            f" (got {block!r}, from {merged.layer_of('loss')})"
            if block is not None and not isinstance(block, dict)
            else ""
        )
        problems.append(
            f"loss: no loss is named{given}; choose one with --loss: "
            f"{', '.join(registry.losses) or 'none is installed'}"
        )
        return None
    try:
        return registry.get(LossSpec, name)
    except DpkdError as error:
        problems.append(f"loss: {error} (from {merged.layer_of('loss.name')})")
        return None


def _validated(
    model: type[ModelT], values: Any, merged: Merged, known: list[str], problems: list[str], prefix: str = ""
) -> ModelT | None:
    try:
        return model.model_validate(values)
    except ValidationError as error:
        problems += sentences(error, merged, known, prefix)
        return None


def _without_mistakes(values: dict[str, Any]) -> RunSettings | None:
    """The settings less those that are wrong, so that what lies between the others is still checked."""
    values = deepcopy(values)
    for _ in range(10):
        try:
            return RunSettings.model_validate(values)
        except ValidationError as error:
            for problem in error.errors():
                _delete(values, problem["loc"])
    return None


def _delete(values: Any, location: tuple[int | str, ...]) -> None:
    """Delete the deepest part of a location that the values have."""
    parent, last = None, None
    for part in location:
        if not isinstance(values, dict) or part not in values:
            break
        parent, last, values = values, part, values[part]
    if parent is not None:
        del parent[last]


def _damaged(values: Mapping[str, Any]) -> set[str]:
    """The blocks with mistakes: what is missing there may only be misspelt."""
    try:
        RunSettings.model_validate(values)
    except ValidationError as error:
        return {str(problem["loc"][0]) for problem in error.errors() if problem["loc"]}
    return set()


def _cross_checks(
    settings: RunSettings,
    spec: LossSpec | None,
    config: LossConfig | None,
    merged: Merged,
    damaged: set[str],
    main: Objective | None,
    extras: Sequence[Objective],
    registry: Registry,
) -> list[str]:
    """What no block can see alone: does the loss fit the text, the teacher, the student?"""
    problems: list[str] = []
    if spec is not None and "text" not in damaged:
        problems += _writer_problems(settings, spec, merged)
        problems += backend_problems(settings, spec, extras, registry)
    if main is not None and settings.teacher.store is not None:
        problems += _store_problems(settings, [main, *extras])
    elif spec is not None and settings.teacher.model is None and "teacher" not in damaged:
        reasons = _teacher_reasons(settings, spec, config)
        for extra in extras:
            reasons += _extra_reasons(extra)
        if reasons:
            problems.append(f"teacher.model: is missing, but {'; '.join(reasons)}. Name one with --teacher.")
    if spec is not None and not damaged & {"text", "dev", "teacher"}:
        problems += adaptive_problems(settings, spec, extras)
    problems += _quantization_problems(settings)
    return problems if "student" in damaged else [*problems, *_student_problems(settings, merged)]


def _store_problems(settings: RunSettings, objectives: Sequence[Objective]) -> list[str]:
    """What a store in the teacher's place cannot do for this run."""
    assert settings.teacher.store is not None
    try:
        manifest = read_manifest(settings.teacher.store)
    except DpkdError as error:
        return [str(error)]
    reasons = _model_reasons(settings)
    problems = [f"teacher.store: {'; '.join(reasons)}: that takes the teacher's model"] if reasons else []
    found = [why_not(o.spec, o.config, o.reads, set(o.writers.values()), manifest) for o in objectives]
    return [*problems, *(f"teacher.store: {reason}" for reason in found if reason is not None)]


def _student_problems(settings: RunSettings, merged: Merged) -> list[str]:
    problems: list[str] = []
    if settings.student.model is None and settings.student.init == "pretrained":
        problems.append(
            "student.model: is missing. Name one with --student, or make it from the teacher: "
            "--set student.init=layers --set student.layers=12"
        )
    if settings.student.model is not None and settings.student.init == "layers":
        problems.append(
            f"student.model: {settings.student.model} is not used with student.init=layers, which takes the teacher's "
            f"own layers (from {merged.layer_of('student.model')}); leave one of the two out"
        )
    return problems


def _quantization_problems(settings: RunSettings) -> list[str]:
    """Packed weights can be read, not copied from."""
    if settings.teacher.quantization == "none" or settings.student.init != "layers":
        return []
    return [
        f"teacher.quantization: {settings.teacher.quantization} packs the weights, and student.init=layers copies "
        "them. Make such a student by a run without quantization first, and name its model as student.model"
    ]


def _writers(settings: RunSettings, spec: LossSpec) -> dict[str, Text]:
    """Setting → writer, for all writers of the main loss's text."""
    return {f"text.{name}": writer for name, writer in text_writers(settings.text, spec.family).items()}


def _writer_problems(settings: RunSettings, spec: LossSpec, merged: Merged) -> list[str]:
    problems = []
    accepted = ", ".join(sorted(spec.accepts))
    for path, writer in _writers(settings, spec).items():
        if writer not in spec.accepts:
            layer = merged.layer_of(path) or "the default"
            problems.append(
                f"{path}: the loss {spec.name} takes text by {accepted}, not by {writer.value} (from {layer})"
            )
    source_layer = merged.provenance.get("text.source")
    if spec.family is Family.PAIR and source_layer is not None:
        problems.append(
            f"text.source: {spec.name} compares two responses per prompt; use text.pairs.chosen and "
            f"text.pairs.rejected instead (from {source_layer})"
        )
    pairs_layer = merged.layer_of("text.pairs")
    if spec.family is not Family.PAIR and pairs_layer is not None:
        problems.append(
            f"text.pairs: is used by pair losses only, and {spec.name} is a {spec.family} loss; "
            f"use text.source instead (from {pairs_layer})"
        )
    problems += samples_problem(settings.text, spec.family, "text")
    if Text.STUDENT not in _writers(settings, spec).values():
        problems += [
            f"text.{name}: is used only where the student writes (from {merged.layer_of(f'text.{name}')})"
            for name in ("teacher_mix", "teacher_veto")
            if getattr(settings.text, name) > 0
        ]
    return problems


def _extra_reasons(extra: Objective) -> list[str]:
    """Why a loss beside the main one cannot do without a teacher."""
    reasons = []
    needs = extra.spec.needs(extra.config)
    if needs is not TeacherAccess.NONE:
        reasons.append(f"terms.extra.{extra.name} ({extra.spec.name}) needs its {needs.value}")
    if not extra.shares_text and Text.TEACHER in extra.writers.values():
        reasons.append(f"it writes the responses of terms.extra.{extra.name}")
    return reasons if extra.text is None else [*reasons, *sampling_reasons(extra.text, f"terms.extra.{extra.name}.")]


def _teacher_reasons(settings: RunSettings, spec: LossSpec, config: LossConfig | None) -> list[str]:
    """Why a run cannot do without a teacher."""
    reasons = []
    needs = spec.needs(config)
    if needs is not TeacherAccess.NONE:
        reasons.append(f"the loss {spec.name} needs its {needs.value}")
    writes = [path for path, writer in _writers(settings, spec).items() if writer is Text.TEACHER]
    if writes:
        reasons.append(f"it writes responses ({', '.join(writes)})")
    return [*reasons, *_model_reasons(settings)]


def _model_reasons(settings: RunSettings) -> list[str]:
    """Why a run needs the teacher's model, whatever its loss reads."""
    reasons = sampling_reasons(settings.text)
    if settings.terms.pretrain.weight > 0 and settings.terms.pretrain.kd_ratio > 0:
        reasons.append("terms.pretrain.kd_ratio distils from it on plain text")
    if settings.student.init == "layers" or (settings.student.init == "random" and settings.student.model is None):
        reasons.append(f"student.init={settings.student.init} builds the student from it")
    return reasons
