"""Whether a store of log-probs, or a server, can serve a loss, and what would."""

from __future__ import annotations

from collections.abc import Collection

from dpkd.api import LossConfig, LossSpec, Signal, Text, Trait
from dpkd.models.settings import TeacherSettings
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


def why_not_served(
    spec: LossSpec, config: LossConfig, reads: Collection[Signal], teacher: TeacherSettings
) -> str | None:
    """Why no server of a protocol can serve a loss, and what would; None when one can, if it was started for it."""
    if Signal.TEACHER_HIDDEN in reads:
        return f"{spec.name} reads the teacher's hidden states, which no server gives; name the teacher's model instead"
    if not {Signal.TEACHER_LOGITS, Signal.TEACHER_LOGPS} & set(reads):
        return None
    if teacher.protocol == "openai":
        return (
            f"{spec.name} reads the teacher's log-probs, and an OpenAI-compatible server gives text only: choose a loss "
            "of `dpkd list-losses --offers text`, or serve the teacher with vLLM or SGLang (teacher.protocol)"
        )
    if Signal.TEACHER_LOGITS not in reads or spec.chosen_k is not None or teacher.top_k == -1:
        return None
    enough = spec.top_k(config) if spec.top_k is not None else None
    if enough is not None:
        if teacher.top_k is None or enough <= teacher.top_k:
            return None
        return f"{spec.name} needs {enough} tokens at each position, and teacher.top_k asks for {teacher.top_k}"
    zero = next((name for name in ("single_step_weight", "kd_ratio") if getattr(config, name, 0)), None)
    advice = f"set loss.{zero}=0, or " if zero else ""
    return (
        f"{spec.name} reads whole distributions, which are too large to send: {advice}choose a loss of `dpkd list-losses "
        "--offers chosen-ids` (topk-kl, topk-rkl, topk-jsd), or, for a small vocabulary, set teacher.top_k=-1"
    )
