"""Teachers: what answers for the teacher's distribution, for `teacher.kind`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dpkd.settings import Block


@dataclass(frozen=True)
class TeacherSpec:
    """A kind of teacher, registered by the hook `dpkd_teachers`.

    name     lower-case letters and digits with dashes between
    summary  one line
    open     makes the teacher; heavy packages are imported here, and no earlier
    config   its own settings, a closed and frozen block
    """

    name: str
    summary: str
    open: Callable[..., Any]
    config: type[Block] = Block
