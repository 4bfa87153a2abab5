"""Errors that a user can act on: the command line prints their text and never a traceback; and deprecations."""

from __future__ import annotations

import base64
import unicodedata
import warnings
from collections.abc import Iterable, Sequence
from urllib.parse import quote

PIECE = 6  # characters of a key that are hidden wherever they stand together
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


def redacted(text: str, secrets: Sequence[str]) -> str:
    """A text in which each piece of a secret of `PIECE` characters or more is `…`.

    text     what is to be shown
    secrets  keys and passwords; found in any case, with white space between, backwards, percent-encoded, as hexadecimal
             digits and in base64

    >>> redacted("wrong key sk-ver…, or 's k - v e r y-secret'", ["sk-very-secret"])
    "wrong key …, or '…'"
    """
    forms = [form.lower() for secret in secrets for form in _forms(secret)]
    sizes = {min(PIECE, len(form)) for form in forms}
    pieces = {form[i : i + size] for form in forms for size in sizes for i in range(len(form) - size + 1)}
    places = [i for i, character in enumerate(text) if not character.isspace()]
    squeezed = "".join(text[i].lower()[:1] for i in places)
    hidden: set[int] = set()
    for size in sizes:
        for i in range(len(squeezed) - size + 1):
            if squeezed[i : i + size] in pieces:
                hidden.update(range(places[i], places[i + size - 1] + 1))
    shown = ["…" if i in hidden else character for i, character in enumerate(text)]
    return "".join(c for i, c in enumerate(shown) if c != "…" or i == 0 or shown[i - 1] != "…")


def _forms(secret: str) -> list[str]:
    raw = secret.encode()
    # Base64 depends on what stands before: three alignments, without the characters that mix in a neighbor.
    shifted = [base64.b64encode(b"\0" * shift + raw).decode().rstrip("=")[(0, 2, 3)[shift] :] for shift in range(3)]
    encoded = [part[:-1] if len(part) > PIECE else part for part in shifted]
    return [secret, secret[::-1], quote(secret, safe=""), raw.hex(), *encoded]


class PluginDeprecation(FutureWarning):
    """A plugin uses something that will be removed. Shown by default: who runs the plugin can tell its author."""


def warn_renamed(old: str, new: str) -> None:
    """Warn the caller of the caller that the name `old` of dpkd.api is now `new`."""
    warnings.warn(f"{old} is deprecated; use `{new}`", PluginDeprecation, stacklevel=3)
