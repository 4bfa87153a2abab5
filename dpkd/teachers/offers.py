"""Whether what a teacher offers is enough for a loss, and what would be."""

from __future__ import annotations

from collections.abc import Collection

from dpkd.api import LossConfig, LossSpec, Signal, TeacherAccess, TeacherOffer, Text
from dpkd.api.inputs import TEACHER_LOGPS


def why_not(
    spec: LossSpec, config: LossConfig, reads: Collection[Signal], writers: Collection[Text], offer: TeacherOffer
) -> str | None:
    """Why a teacher cannot serve a loss on responses by these writers, and what would serve; None when it can."""
    if Text.TEACHER in writers and not offer.writes:
        return f"{spec.name} is computed on responses that the teacher writes, and {offer.what} writes none; {_MODEL}"
    if Signal.TEACHER_HIDDEN in reads and offer.access is not TeacherAccess.HIDDEN:
        return f"{spec.name} reads the teacher's hidden states, which {offer.what} does not have; {_MODEL}"
    if not {Signal.TEACHER_LOGITS, *TEACHER_LOGPS} & set(reads):
        return None
    if offer.access in (TeacherAccess.NONE, TeacherAccess.TEXT):
        return f"{spec.name} reads the teacher's {spec.needs(config).value}, and {offer.what} gives text only; {_MODEL}"
    if offer.writers is not None and Text.STUDENT in writers:
        return (
            f"{spec.name} reads the teacher on responses that the student writes during the run, which {offer.what} "
            f"cannot have; {_MODEL}, or train on responses by dataset or teacher"
        )
    unknown = sorted(set(writers) - offer.writers) if offer.writers is not None else []
    if unknown:
        way = _more(offer, unknown[0])
        return (
            f"{offer.what} has responses by {' and '.join(sorted(offer.writers or ()))}, not by "
            f"{' or '.join(unknown)}{'; ' if way else ''}{way}"
        )
    return _distribution_fails(spec, config, offer) if Signal.TEACHER_LOGITS in reads else None


_MODEL = "name the teacher's model instead (teacher.model)"


def _distribution_fails(spec: LossSpec, config: LossConfig, offer: TeacherOffer) -> str | None:
    """Why what a teacher says of a distribution is not enough for a loss that reads distributions."""
    enough = spec.top_k(config) if spec.top_k is not None else None
    linear = spec.is_linear(config)
    if offer.access in (TeacherAccess.LOGITS, TeacherAccess.HIDDEN):
        return None
    if spec.chosen_k is not None and offer.access is TeacherAccess.CHOSEN_IDS:
        return None
    if offer.access in (TeacherAccess.TOP_K, TeacherAccess.CHOSEN_IDS):
        if 0 < offer.vocabulary <= offer.k or (enough is not None and enough <= offer.k):
            return None
    elif offer.access is TeacherAccess.SAMPLED and linear:
        return None
    ways = [_more(offer, TeacherAccess.TOP_K, enough) if enough is not None else ""]
    ways += [_more(offer, TeacherAccess.SAMPLED) if linear else "", _more(offer, TeacherAccess.LOGITS)]
    would = " or ".join(way for way in ways if way)
    would = f"{would} would serve" if would else "only the teacher's model serves it (teacher.model)"
    return f"{spec.name} reads whole distributions, and {offer.what} has {offer.has}; {would}"


def _more(offer: TeacherOffer, what: TeacherAccess | Text, k: int | None = None) -> str:
    """How to get more of a teacher, in words; empty: not at all."""
    return offer.more(what, k) if offer.more is not None else ""
