"""Response sources: who writes the responses that a loss is computed on, for `text.source`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dpkd.settings import Block


@dataclass(frozen=True)
class SourceSpec:
    """A response source, registered by the hook `dpkd_response_sources`.

    name     lower-case letters and digits with dashes between
    summary  one line
    open     makes the source; heavy packages are imported here, and no earlier
    config   its own settings, a closed and frozen block
    """

    name: str
    summary: str
    open: Callable[..., Any]
    config: type[Block] = Block
