"""What is wrong with settings that name objects in memory."""

from __future__ import annotations

from dpkd.config.layers import Merged
from dpkd.config.settings import RunSettings
from dpkd.data.memory import is_memory, refuse_memory
from dpkd.errors import DpkdError
from dpkd.models.in_memory import InMemory

# How something is found and read: of an object in memory that was decided before.
POINTLESS = {
    "teacher.model": ("revision", "dtype", "attention", "quantization", "trust_remote_code"),
    "student.model": ("revision", "attention", "quantization", "trust_remote_code"),
    "data.path": ("subset", "split", "streaming"),
}


def memory_problems(settings: RunSettings, merged: Merged, in_memory: InMemory) -> list[str]:
    """Names of objects that nobody gave, and settings that say nothing of an object, in sentences."""
    problems: list[str] = []
    for path, pointless in POINTLESS.items():
        block, _, key = path.partition(".")
        values = getattr(settings, block)
        name = getattr(values, key)
        if not is_memory(name):
            continue
        if name not in in_memory.models and name not in in_memory.data:
            problems += _nobody_gave(name, path)
        for other in pointless:
            if getattr(values, other) != type(values).model_fields[other].default:
                layer = merged.layer_of(f"{block}.{other}")
                problems.append(f"{block}.{other}: has no effect on {name}, which is in memory (from {layer})")
    return problems


def _nobody_gave(name: str, path: str) -> list[str]:
    try:
        refuse_memory(name, path)
    except DpkdError as error:
        return [str(error)]
    return []
