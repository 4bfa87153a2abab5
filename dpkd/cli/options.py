"""Flags that several commands share, and how they become layers of settings."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from dpkd.config.resolve import Resolved

__all__ = ["Config", "Data", "LossName", "Output", "Seed", "Set", "Student", "Teacher", "resolved"]

LossName = Annotated[str | None, typer.Option("--loss", help="objective, see `dpkd list-losses`", show_default=False)]
Teacher = Annotated[str | None, typer.Option(help="teacher: hub id or folder", show_default=False)]
Student = Annotated[str | None, typer.Option(help="student: hub id or folder", show_default=False)]
Data = Annotated[
    str | None,
    typer.Option(
        help="data: hub id, or JSONL, JSON, CSV, parquet file [default: databricks/databricks-dolly-15k]",
        show_default=False,
    ),
]
Output = Annotated[str | None, typer.Option(help="run folder [default: runs/LOSS-N]", show_default=False)]
Config = Annotated[list[Path] | None, typer.Option("--config", help="YAML file of settings; repeatable, later wins")]
Set = Annotated[list[str] | None, typer.Option("--set", help="path=value, e.g. train.lr=1e-4; repeatable")]
Seed = Annotated[
    int | None, typer.Option(help="seed of order, sampling and new weights [default: 10]", show_default=False)
]


def resolved(
    *, config: list[Path] | None, assignments: list[str] | None, flags: dict[str, tuple[str, Any]]
) -> Resolved:
    """Settings from files, then flags and --set; `flags` maps a flag to its path and value (None: not given)."""
    from dpkd.config.layers import user_layers
    from dpkd.config.resolve import resolve
    from dpkd.host import load_host

    return resolve(user_layers(config or [], flags, assignments or []), load_host())
