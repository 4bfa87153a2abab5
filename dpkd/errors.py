"""Errors that a user can act on: the command line prints their text and never a traceback; and deprecations."""

from __future__ import annotations

import unicodedata
import warnings
from collections.abc import Iterable

_BIDI = frozenset({"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"})


class DpkdError(Exception):
    """A mistake of the user or of a plugin, said in a sentence: what was found, what was expected, what to do."""

    exit_code = 1


class SettingsError(DpkdError):
    """Every mistake found in the settings: `problems` has one sentence for each."""

    exit_code = 2

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))


class Stopped(DpkdError):
    """A run that was asked to stop before its end; what it did is kept.

    `text` says how to resume it, and `signal_number` is the signal, which decides the exit code.
    """

    def __init__(self, text: str, signal_number: int) -> None:
        self.exit_code = 128 + signal_number
        super().__init__(text)


class ForeignExit(DpkdError):
    """A plugin or a library ended the program; whatever exit `code` it gave, the command was not done."""

    def __init__(self, code: object) -> None:
        if isinstance(code, int) and code > 128:
            self.exit_code = code  # a signal
        super().__init__(
            f"the program was ended by sys.exit({code!r}), which dpkd itself never calls here: a plugin or a library "
            "did; --traceback shows which"
        )


def described(error: BaseException, longest: int = 500) -> str:
    """An `error` in one line: its class and its message, where that can be had, cut after `longest` characters."""
    try:
        text = " ".join(str(error).split())
    except BaseException:  # an error of a plugin may do anything when it is shown
        return f"{type(error).__name__} (its message cannot be shown)"
    shown = text if len(text) <= longest else f"{text[:longest]}..."
    return f"{type(error).__name__}: {shown}"


def printable(text: str) -> str:
    r"""A `text` from outside as a terminal may print it: control characters and bidirectional marks in words.

    >>> printable("a\x1b[31mb\u202ec") == r"a\x1b[31mb\u202ec"
    True
    """
    return "".join(c if c in "\n\t" or not _acts(c) else c.encode("unicode_escape").decode() for c in text)


def _acts(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Cs") or unicodedata.bidirectional(character) in _BIDI


class PluginDeprecation(FutureWarning):
    """A plugin uses something that will be removed. Shown by default: who runs the plugin can tell its author."""


def warn_renamed(old: str, new: str) -> None:
    """Warn the caller of the caller that the name `old` of dpkd.api is now `new`."""
    warnings.warn(f"{old} is deprecated; use `{new}`", PluginDeprecation, stacklevel=3)
