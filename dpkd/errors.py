"""Errors that a user can act on: the command line prints their text and never a traceback."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["DpkdError", "SettingsError"]


class DpkdError(Exception):
    """A mistake of the user or of a plugin, said in a sentence: what was found, what was expected, what to do."""

    exit_code = 1


class SettingsError(DpkdError):
    """Every mistake found in the settings, one sentence each."""

    exit_code = 2

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))
