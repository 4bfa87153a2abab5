"""Whether a store of log-probs can serve a loss, and what would."""

from __future__ import annotations

from collections.abc import Collection

from dpkd.api import LossConfig, LossSpec, Signal, Text, Trait
from dpkd.teachers.store_manifest import Manifest


def why_not(
    spec: LossSpec, config: LossConfig, reads: Collection[Signal], writers: Collection[Text], manifest: Manifest
) -> str | None:
    """Why a store cannot serve a loss on text by these writers, and what would serve; None when it can."""
    if Signal.TEACHER_HIDDEN in reads:
        return f"{spec.name} reads the teacher's hidden states, which no store has; name the teacher's model instead"
    if not {Signal.TEACHER_LOGITS, Signal.TEACHER_LOGPS} & set(reads):
        return None
    if Text.STUDENT in writers:
        return (
            f"{spec.name} reads the teacher on text that the student writes anew, which no store can have; name the "
            "teacher's model, or train on responses by dataset or teacher"
        )
    unknown = sorted(set(writers) - {Text(writer) for writer in manifest.text})
    if unknown:
        return (
            f"the store has responses by {' and '.join(manifest.text)}, not by {' or '.join(unknown)}; write it with "
            f"`dpkd cache --responses {unknown[0]}`"
        )
    return _kind_fails(spec, config, manifest) if Signal.TEACHER_LOGITS in reads else None


def _kind_fails(spec: LossSpec, config: LossConfig, manifest: Manifest) -> str | None:
    """Why this kind of numbers is not enough for a loss that reads distributions."""
    enough = spec.top_k(config) if spec.top_k is not None else None
    # A temperature bends the teacher: samples drawn at 1 stand for it at 1 only.
    linear = Trait.LINEAR_IN_TEACHER in spec.traits and getattr(config, "temperature", 1.0) == 1.0
    if manifest.kind == "topk" and (manifest.k >= manifest.vocabulary or (enough is not None and enough <= manifest.k)):
        return None
    if manifest.kind == "sampled" and linear:
        return None
    options = []
    if enough is not None:
        options.append(f"`dpkd cache --kind topk --k {enough}` (or more)")
    if linear:
        options.append("`dpkd cache --kind sampled`")
    would = f"{' or '.join(options)} would serve" if options else "only the teacher's model serves it (teacher.model)"
    return f"{spec.name} reads whole distributions, and the store has {manifest.sentence().split(' of ')[0]}; {would}"
