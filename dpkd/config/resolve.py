"""From layers to the settings of a run: everything is checked here, once, and all mistakes are reported together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from dpkd.api import Family, LossSpec, SourceConfig, SourceSpec, TeacherAccess, TeacherOffer, Text
from dpkd.config.aliases import in_our_names, renamed
from dpkd.config.extras import extra_objective
from dpkd.config.layers import Layer, Merged, drop, merge, suggestion_layer
from dpkd.config.memory import memory_problems
from dpkd.config.objective import Objective, schedule_problems, without_misspelt
from dpkd.config.problems import all_paths, sentences, with_layers
from dpkd.config.settings import RunSettings
from dpkd.config.teacher import offer_of
from dpkd.config.text import (
    dev_problems,
    drop_outdated,
    loss_problems,
    own_settings,
    reward_problems,
    sampler_problems,
    source_of,
    teacher_reasons,
)
from dpkd.errors import DpkdError, SettingsError
from dpkd.models.in_memory import InMemory
from dpkd.plugins import RegisteredLoss, Registry
from dpkd.teachers.offers import why_not

ModelT = TypeVar("ModelT", bound=BaseModel)


@dataclass(frozen=True)
class Resolved:
    """Checked settings, the losses with their own checked settings, and where each value came from.

    `registry` has the plugins that other settings name, such as samplers. `in_memory` has the models and rows that are
    there; the settings have names for them.
    """

    settings: RunSettings
    main: Objective
    provenance: dict[str, str]
    registry: Registry
    extras: tuple[Objective, ...] = ()
    in_memory: InMemory = field(default_factory=InMemory)

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """The main loss, then those beside it."""
        return (self.main, *self.extras)

    @property
    def loss(self) -> LossSpec:
        """The main loss."""
        return self.main.spec

    @property
    def plugin(self) -> str:
        """Distribution and version that the loss came from."""
        return f"{self.main.registered.distribution} {self.main.registered.version}"

    def as_dict(self) -> dict[str, Any]:
        """All settings that the run uses, as a file of settings would have them."""
        loss = {"name": self.loss.name, **self.main.config.model_dump(mode="json")}
        return {"loss": loss, **self.settings.model_dump(mode="json")}


def resolve(
    layers: Sequence[Layer], registry: Registry, in_memory: InMemory | None = None, *, unread: Sequence[str] = ()
) -> Resolved:
    """Merge and check the layers; `in_memory` has what they name and a caller has in memory.

    Raises SettingsError with a sentence for every mistake in any layer, in the loss's settings, and between them,
    after those of `unread`: what a caller found in reading the layers.
    """
    in_memory, problems = in_memory or InMemory(), list(unread)
    layers = in_our_names([renamed(layer) for layer in layers])
    registered, layers, merged = _with_suggestions(layers, registry, problems)
    loss = merged.values.pop("loss", {})
    known = [*all_paths(RunSettings), "loss.name"]
    if registered is not None:
        known += all_paths(registered.spec.config, "loss.")
    family = registered.spec.family if registered is not None else Family.TOKEN
    source, text = _text(merged, family, registry, [layer.name for layer in layers], known, problems)
    values = {name: block for name, block in merged.values.items() if name != "text"}
    values |= {} if text is None else {"text": text}
    if registered is not None:
        values["schedules"], misspelt = without_misspelt(registered.spec, values.get("schedules", {}), "schedules")
        problems += with_layers(misspelt, merged)
    settings = _validated(RunSettings, values, merged, known, problems)
    merged.values["loss"] = {k: v for k, v in loss.items() if k != "name"} if isinstance(loss, dict) else {}
    config = None
    if registered is not None:
        config = _validated(registered.spec.config, merged.values["loss"], merged, known, problems, "loss.")
    main, extras = None, list[Objective]()
    if (sound := settings or _without_mistakes(values)) is not None:
        found = list[str]()
        extras = _extras(sound, source, text, registry, found)
        problems += with_layers(found, merged)
        if registered is not None and source is not None:
            own = config or registered.spec.config()
            main = Objective("main", registered, own, sound.terms.main, source, sound.text, sound.schedules)
            found = [] if config is None else schedule_problems(main.spec, config, sound.schedules, "schedules")
            problems += with_layers(found, merged)
        damaged = _damaged(values) | ({"text"} if text is None else set())
        problems += _cross_checks(sound, merged, damaged, main, extras, registry)
        problems += memory_problems(sound, merged, in_memory)
    if problems:
        raise SettingsError(problems)
    assert settings is not None
    assert main is not None
    return Resolved(settings, main, dict(merged.provenance), registry, tuple(extras), in_memory)


def _with_suggestions(
    layers: Sequence[Layer], registry: Registry, problems: list[str]
) -> tuple[RegisteredLoss | None, Sequence[Layer], Merged]:
    """The loss that the layers name, the layers above its suggestions, and all of them merged."""
    merged = merge(layers)
    registered = _registered(merged, registry, problems)
    if registered is None:
        return None, layers, merged
    layers = [renamed(suggestion_layer(registered.spec.name, registered.spec.suggests)), *layers]
    merged = merge(layers)
    _leave_set_values_alone(merged, registered.spec.name)
    return registered, layers, merged


def _extras(
    settings: RunSettings, source: SourceSpec | None, text: SourceConfig | None, registry: Registry, problems: list[str]
) -> list[Objective]:
    """The losses beside the main one, whose source and its settings are given where they are sound."""
    main = None if source is None or text is None else (source, text)
    extras = []
    for name, term in settings.terms.extra.items():
        extra, found = extra_objective(name, term, main, registry)
        problems += found
        extras += [extra] if extra is not None else []
    return extras


def _text(
    merged: Merged, family: Family, registry: Registry, order: Sequence[str], known: list[str], problems: list[str]
) -> tuple[SourceSpec | None, SourceConfig | None]:
    """The source of the main loss, and its settings; None where these have mistakes."""
    try:
        source = source_of(merged.values.get("text"), family, registry)
    except DpkdError as error:
        problems.append(f"text.source: {error} (from {merged.layer_of('text.source')})")
        return None, None
    drop_outdated(merged, source, order)
    known += all_paths(source.config, "text.")
    own, foreign = own_settings(merged.values.get("text", {}), source, registry)
    problems += [f"text.{key}: {why} (from {merged.layer_of(f'text.{key}')})" for key, why in foreign.items()]
    config = _validated(source.config, own, merged, known, problems, "text.")
    return source, None if foreign else config


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
    merged: Merged,
    damaged: set[str],
    main: Objective | None,
    extras: Sequence[Objective],
    registry: Registry,
) -> list[str]:
    """What no block can see alone: does the loss fit the text, the teacher, the student?"""
    problems: list[str] = []
    texts = {f"terms.extra.{extra.name}.text": extra for extra in extras if not extra.shares_text}
    if main is not None and "text" not in damaged:
        texts = {"text": main, **texts}
        problems += [
            f"{setting}: {why} (from {merged.layer_of(setting) or 'the default'})"
            for setting, why in loss_problems(main.text, main.spec, "text", registry)
        ]
        problems += sampler_problems(settings, texts, registry)
        problems += reward_problems(texts, registry)
    try:
        offer = offer_of(settings.teacher, registry)
    except SettingsError as error:
        return [*problems, *error.problems]
    except DpkdError as error:
        return [*problems, str(error)]
    if main is not None and offer is not None:
        problems += _offer_problems(settings, [main, *extras], offer)
    elif main is not None and "teacher" not in damaged:
        reasons = [*_teacher_reasons(main, "text" in damaged), *_model_reasons(settings)]
        for extra in extras:
            reasons += _extra_reasons(extra)
        if reasons:
            advice = f"Name one with --teacher{_without(main, reasons)}"
            problems.append(f"teacher.model: is missing, but {'; '.join(reasons)}. {advice}.")
    if main is not None and not damaged & {"text", "dev", "teacher"}:
        problems += dev_problems(settings, texts)
    problems += _quantization_problems(settings)
    return problems if "student" in damaged else [*problems, *_student_problems(settings, merged)]


def _offer_problems(settings: RunSettings, objectives: Sequence[Objective], offer: TeacherOffer) -> list[str]:
    """What the teacher of this run cannot do for it."""
    named = [name for name in ("store", "server") if getattr(settings.teacher, name) is not None]
    place = f"teacher.{named[0]}" if named else "teacher"
    reasons = [] if settings.teacher.in_memory else _model_reasons(settings)
    problems = [f"{place}: {'; '.join(reasons)}: this needs the teacher's model"] if reasons else []
    found = [why_not(o.spec, o.config, o.reads, set(o.writers), offer) for o in objectives]
    return [*problems, *(f"{place}: {reason}" for reason in found if reason is not None)]


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
        f"teacher.quantization: {settings.teacher.quantization} quantizes the weights, but student.init=layers copies "
        "them. Create the student in a run without quantization first, and pass its model as student.model"
    ]


def _extra_reasons(extra: Objective) -> list[str]:
    """Why a loss beside the main one cannot do without a teacher."""
    reasons = []
    needs = extra.spec.needs(extra.config)
    if needs is not TeacherAccess.NONE:
        reasons.append(f"terms.extra.{extra.name} ({extra.spec.name}) needs its {needs.value}")
    if not extra.shares_text and Text.TEACHER in extra.writers:
        reasons.append(f"it writes the responses of terms.extra.{extra.name}")
    return [*reasons, *([] if extra.shares_text else teacher_reasons(extra.text, f"terms.extra.{extra.name}.text"))]


def _teacher_reasons(main: Objective, damaged: bool) -> list[str]:
    """Why the main loss cannot do without a teacher; of a text with mistakes nothing is known."""
    reasons = []
    needs = main.spec.needs(main.config)
    if needs is not TeacherAccess.NONE:
        reasons.append(f"the loss {main.spec.name} needs its {needs.value}")
    if Text.TEACHER in main.writers and not damaged:
        reasons.append(f"it writes responses (text.{main.text.writers[Text.TEACHER]})")
    return reasons


def _without(main: Objective, reasons: Sequence[str]) -> str:
    """How to do without a teacher, where all that it would do is write what the data may hold already."""
    only_writes = main.spec.needs(main.config) is TeacherAccess.NONE and len(reasons) == 1
    if not (only_writes and Text.TEACHER in main.writers and Text.DATASET in main.spec.accepts):
        return ""
    return "; if its responses are in your data, --set text.source=dataset needs none"


def _model_reasons(settings: RunSettings) -> list[str]:
    """Why a run needs the teacher's model, whatever its loss reads."""
    reasons = teacher_reasons(settings.text)
    if settings.terms.pretrain.weight > 0 and settings.terms.pretrain.kd_ratio > 0:
        reasons.append("terms.pretrain.kd_ratio distils from it on plain text")
    if settings.student.init == "layers" or (settings.student.init == "random" and settings.student.model is None):
        reasons.append(f"student.init={settings.student.init} builds the student from it")
    return reasons
