"""The skeleton of a loss package: `dpkd new-loss`. Text only; imports no torch."""

from __future__ import annotations

from dpkd.scaffold.names import Names, names_of
from dpkd.scaffold.write import KINDS, rendered, write_package

__all__ = ["KINDS", "Names", "names_of", "rendered", "write_package"]
