"""Flags that several commands share, and how they become layers of settings."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from dpkd.config.resolve import Resolved
    from dpkd.data.settings import DataSettings

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
SetData = Annotated[
    list[str] | None,
    typer.Option("--set", help="data.NAME=VALUE, e.g. data.on_bad_row=skip, data.template=chat; repeatable"),
]
Seed = Annotated[
    int | None, typer.Option(help="seed of order, sampling and new weights [default: 10]", show_default=False)
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="run Python code from the models' repositories")
]


_SETTINGS = {"loss": "loss.name", "teacher": "teacher.model", "student": "student.model", "data": "data.path"}


def run_flags(**values: Any) -> dict[str, tuple[str, Any]]:
    """The flags of a run by their names: each with the path of its setting and its value (None: not given)."""
    return {f"--{name}": (_SETTINGS.get(name, name), value) for name, value in values.items()}


def data_settings(given: dict[str, Any], assignments: list[str] | None) -> DataSettings:
    """The block `data` alone, from flags and --set data.NAME=VALUE; flags win over what is not given there.

    Raises SettingsError for every mistake.
    """
    from dpkd.config.layers import Layer, merge, set_layer
    from dpkd.config.problems import checked
    from dpkd.data.settings import DataSettings
    from dpkd.errors import SettingsError

    values = merge([Layer("flags", {"data": given}), *set_layer(assignments or [])]).values
    others = [f"--set {block}: only settings of `data` may be set here" for block in values if block != "data"]
    if others:
        raise SettingsError(others)
    return checked(DataSettings, values["data"], "data")


def resolved(
    *, config: list[Path] | None, assignments: list[str] | None, flags: dict[str, tuple[str, Any]]
) -> Resolved:
    """Settings from files, then flags and --set; `flags` maps a flag to its path and value (None: not given)."""
    from dpkd.config.layers import user_layers
    from dpkd.config.resolve import resolve
    from dpkd.plugins import load_registry

    unread = list[str]()
    layers = user_layers(config or [], flags, assignments or [], unread)
    return resolve(layers, load_registry(), unread=unread)
