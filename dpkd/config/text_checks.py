"""What a text needs beside its own block: held-out rows, the teacher's model."""

from __future__ import annotations

from collections.abc import Sequence

from dpkd.api import Family, LossSpec
from dpkd.config.objective import Objective
from dpkd.config.settings import RunSettings
from dpkd.rollout.settings import TextSettings


def adaptive_problems(settings: RunSettings, spec: LossSpec, extras: Sequence[Objective]) -> list[str]:
    """What adaptive text lacks: the held-out loss that it follows."""
    texts = {e.name: e.text for e in extras if e.text is not None}
    paths = [f"terms.extra.{name}.text.source" for name, text in texts.items() if text.source == "adaptive"]
    if spec.family is not Family.PAIR and settings.text.source == "adaptive":
        paths.append("text.source")
    lacking = []
    if settings.dev.path is None:
        lacking.append("held-out rows (dev.path, and dev.every for how often)")
    if settings.teacher.model is None:
        lacking.append("the teacher's model, with which the loss on them is taken (--teacher)")
    needs = " and ".join(lacking)
    return [f"{path}: adaptive follows the loss on held-out text, and needs {needs}" for path in paths if lacking]


def sampling_reasons(text: TextSettings, path: str = "") -> list[str]:
    """Why the student cannot write without the teacher's model."""
    reasons = []
    if text.teacher_mix > 0:
        reasons.append(f"{path}text.teacher_mix mixes it into the student's sampling")
    if text.teacher_veto > 0:
        reasons.append(f"{path}text.teacher_veto lets it replace what the student writes")
    return reasons
