"""The teachers that `model`, `store`, `server` and `base` of the block `teacher` name: kinds like those of plugins."""

from __future__ import annotations

from dpkd.api import TeacherAccess, TeacherOffer, TeacherSpec
from dpkd.models.in_memory import InMemory
from dpkd.models.settings import TeacherSettings
from dpkd.teachers.base import OFFER, BaseTeacher
from dpkd.teachers.local import LocalTeacher
from dpkd.teachers.server.teacher import ServerTeacher, served_offer
from dpkd.teachers.store import StoreTeacher
from dpkd.teachers.store_manifest import read_manifest


def built_in_kind(settings: TeacherSettings, in_memory: InMemory) -> TeacherSpec | None:
    """The kind of teacher that the settings name, which are its own settings; None where they name none."""
    if settings.base:
        return TeacherSpec("base", "the student's own base", lambda _: BaseTeacher(), lambda _: OFFER)
    if settings.server is not None:
        return TeacherSpec("server", "a model on a server", ServerTeacher, served_offer)
    if (store := settings.store) is not None:
        return TeacherSpec(
            "store", "log-probs on disk", lambda _: StoreTeacher(store), lambda _: read_manifest(store).offer
        )
    if settings.model is not None:
        return TeacherSpec(
            "local",
            "a model in this process",
            lambda own: LocalTeacher(own, in_memory),
            lambda _: TeacherOffer(TeacherAccess.HIDDEN),
        )
    return None
