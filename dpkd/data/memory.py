"""Names for what has none on any disk: models and rows that a caller has in memory."""

from __future__ import annotations

from dpkd.errors import DpkdError

PREFIX = "in-memory:"


def memory_name(what: str) -> str:
    """What the settings of a run call an object in memory: `in-memory:teacher`."""
    return PREFIX + what


def is_memory(name: str | None) -> bool:
    """Whether a name stands for an object in memory."""
    return name is not None and name.startswith(PREFIX)


def refuse_memory(name: str, setting: str) -> None:
    """Raises DpkdError for the name of an object in memory, where only disk and hub can be asked."""
    if is_memory(name):
        what = name.removeprefix(PREFIX)
        raise DpkdError(
            f"{setting}: {name} refers to an object in the memory of another Python process. "
            f"To resume such a run: dpkd.resume(FOLDER, {what}=...), with the same object"
        )
