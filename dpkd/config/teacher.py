"""The block `teacher`: which kind of teacher it names, what that offers, and how it is made."""

from __future__ import annotations

from typing import Any

from dpkd.api import Block, Teacher, TeacherAccess, TeacherOffer, TeacherSpec
from dpkd.config.problems import checked
from dpkd.models.in_memory import InMemory
from dpkd.models.settings import TeacherSettings
from dpkd.plugins import Registry
from dpkd.teachers.base import OFFER, BaseTeacher
from dpkd.teachers.local import LocalTeacher
from dpkd.teachers.server.teacher import ServerTeacher, served_offer
from dpkd.teachers.store import StoreTeacher
from dpkd.teachers.store_manifest import read_manifest


def offer_of(settings: TeacherSettings, registry: Registry) -> TeacherOffer | None:
    """What the teacher offers that the settings name; None where they name none.

    Raises DpkdError when there is no such kind or store, SettingsError when the kind's own settings have mistakes.
    """
    if settings.kind != "auto":
        spec, config = _kind(settings, registry)
        return spec.offer(config)
    if settings.server is not None:
        return served_offer(settings)
    if settings.base:
        return OFFER
    if settings.store is not None:
        return read_manifest(settings.store).offer
    return TeacherOffer(TeacherAccess.HIDDEN) if settings.model is not None else None


def make_teacher(settings: TeacherSettings, registry: Registry, in_memory: InMemory) -> Teacher | None:
    """The teacher that the settings name, before anything of it is loaded; None where they name none."""
    if settings.kind != "auto":
        spec, config = _kind(settings, registry)
        return spec.open(config)
    if settings.server is not None:
        return ServerTeacher(settings)
    if settings.base:
        return BaseTeacher()
    if settings.store is not None:
        return StoreTeacher(settings.store)
    return LocalTeacher(settings, in_memory) if settings.model is not None else None


def _kind(settings: TeacherSettings, registry: Registry) -> tuple[TeacherSpec, Block]:
    spec = registry.get(TeacherSpec, settings.kind).spec
    config: Any = checked(spec.config, settings.settings, "teacher.settings")
    return spec, config
