"""The names in a loss package, all made from the name of its loss."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from dpkd.errors import SettingsError

_FORM = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
# With these the class of the loss or of its settings would hide the base that it inherits from.
_BASES = ("loss", "pair", "rollout", "token")


@dataclass(frozen=True)
class Names:
    """What things are called: `tail-kl` is the loss TailKlLoss in dpkd_tail_kl.py of the package dpkd-tail-kl."""

    name: str
    package: str
    module: str
    test: str
    Class: str

    def as_dict(self) -> dict[str, str]:
        """Placeholder → text."""
        return dict(vars(self))


def names_of(name: str, taken: Mapping[str, str]) -> Names:
    """The names that follow from a loss's name; `taken` maps the names of installed losses to where they come from.

    Raises SettingsError for a name that no loss may have, or that one has.
    """
    problem = _problem(name, taken)
    if problem:
        raise SettingsError([problem])
    package = name if name.startswith("dpkd-") else f"dpkd-{name}"
    words = name.split("-")
    return Names(
        name=name,
        package=package,
        module=package.replace("-", "_"),
        test=f"test_{name.replace('-', '_')}",
        Class="".join(word.capitalize() for word in words),
    )


def _problem(name: str, taken: Mapping[str, str]) -> str:
    if not _FORM.fullmatch(name):
        near = re.sub(r"(?<=[a-z])(?=[A-Z])", "-", name)
        near = re.sub(r"[^a-z0-9]+", "-", near.lower()).strip("-").lstrip("0123456789-")
        hint = f"; did you mean {near}?" if near else ""
        return (
            f"new-loss {name!r}: a name is lower-case letters and digits with dashes between, a letter first "
            f"(it is what --loss takes){hint}"
        )
    if name in taken:
        return f"new-loss {name}: a loss of this name is installed, from {taken[name]}, and two would both be refused"
    if name in _BASES:
        return f"new-loss {name}: a class of dpkd.api has this name; choose one that says what the loss does"
    if name in ("dpkd", "zoo"):
        return f"new-loss {name}: dpkd's own modules have this name; choose another"
    return ""
