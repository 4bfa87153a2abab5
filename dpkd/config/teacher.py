"""The block `teacher`: which kind of teacher it names, what that offers, and how it is made."""

from __future__ import annotations

from typing import Any

from dpkd.api import Teacher, TeacherOffer, TeacherSpec
from dpkd.config.problems import checked
from dpkd.models.in_memory import InMemory
from dpkd.models.settings import TeacherSettings
from dpkd.plugins import Registry
from dpkd.teachers.built_in import built_in_kind


def offer_of(settings: TeacherSettings, registry: Registry) -> TeacherOffer | None:
    """What the teacher offers that the settings name; None where they name none.

    Raises DpkdError when there is no such kind or store, SettingsError when the kind's own settings have mistakes.
    """
    spec, config = _kind(settings, registry, InMemory())
    return None if spec is None else spec.offer(config)


def make_teacher(settings: TeacherSettings, registry: Registry, in_memory: InMemory) -> Teacher | None:
    """The teacher that the settings name, before anything of it is loaded; None where they name none."""
    spec, config = _kind(settings, registry, in_memory)
    return None if spec is None else spec.open(config)


def _kind(settings: TeacherSettings, registry: Registry, in_memory: InMemory) -> tuple[TeacherSpec | None, Any]:
    """A kind of teacher, and its own settings."""
    if settings.kind == "auto":
        return built_in_kind(settings, in_memory), settings
    spec = registry.get(TeacherSpec, settings.kind).spec
    return spec, checked(spec.config, settings.settings, "teacher.settings")
