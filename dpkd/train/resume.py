"""Continuing a run from its folder: with its own settings, but for those that change neither data nor models."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from dpkd.api import Callback
from dpkd.config.aliases import written_layers
from dpkd.config.layers import set_layer
from dpkd.config.resolve import Resolved, resolve
from dpkd.config.write import read_sources
from dpkd.errors import DpkdError, SettingsError
from dpkd.evaluation.target import check_model
from dpkd.models.in_memory import InMemory
from dpkd.plugins import Registry, load_registry
from dpkd.run_folder import RunFolder, check_trust
from dpkd.settings import flat
from dpkd.train.run import resume
from dpkd.train.timings import Timings

# What a run that goes on may do otherwise: its data, models, losses and random numbers stay.
CHANGEABLE = frozenset(
    {f"train.{name}" for name in ("lr", "min_lr", "schedule", "warmup_steps", "weight_decay", "betas", "eps", "clip")}
    | {f"train.{name}" for name in ("precision", "chunk_mib", "micro_batch_size", "device", "log_every", "trackers")}
    | {f"train.{name}" for name in ("steps", "epochs", "save_every", "keep_checkpoints")}
    | {f"dev.{name}" for name in ("every", "patience")}
)
EXTENDING = frozenset({"train.steps", "train.epochs", "dev.patience"})


def resume_folder(
    path: Path,
    *,
    assignments: Sequence[str] = (),
    trust_remote_code: bool = False,
    in_memory: InMemory | None = None,
    registry: Registry | None = None,
    callbacks: Sequence[Callback] = (),
    console: Console | None = None,
    timings: Timings | None = None,
) -> RunFolder:
    """Continue the run in a folder with its own settings, but for some `PATH=VALUE` of CHANGEABLE.

    A finished run goes on when it is given more steps. `in_memory` has what was in memory when the run began,
    `registry` the plugins (None: the installed ones), `timings` gets where the time goes.
    Raises DpkdError when the folder holds no run, or one that is finished, when a setting may not change, when the
    settings want foreign code to run and `trust_remote_code` does not allow it, or when `in_memory` is not what
    it needs.
    """
    folder = RunFolder.existing(path)
    registry, in_memory = registry or load_registry(), in_memory or InMemory()
    own = written_layers(folder.config, registry)
    for layer in own:
        check_trust(layer.values, folder.config, trust_remote_code)
    unread = list[str]()
    layers = [*own, *set_layer(assignments, unread)]
    resolved = resolve(layers, registry, in_memory, unread=unread)
    changes = _changes(resolve(own, registry, in_memory), resolved) if assignments else {}
    # Values still come from where they came from at the beginning; what is said of them in the card depends on it.
    sources = read_sources(folder.config.read_text(encoding="utf-8"))
    new = {path: resolved.provenance[path] for path in changes if path in resolved.provenance}
    resolved = replace(resolved, provenance=sources | new)
    if folder.is_finished and not changes.keys() & EXTENDING:
        with folder.lock():  # where the run was killed as it cleaned up, or could not remove something
            shutil.rmtree(folder.best, ignore_errors=True)
        raise DpkdError(
            f"{path} is finished: its model is {folder.model}. To train it further, give it more steps: "
            f"dpkd train --resume {path} --set train.steps=N"
        )
    folder.check_records()
    check_model(folder)
    settings = resolved.settings
    needed = {settings.teacher.model, settings.student.model, settings.data.path}
    if unused := sorted({*in_memory.models, *in_memory.data} - needed):
        raise DpkdError(f"{path} did not begin with {' and '.join(unused)}: its settings name what it reads")
    return resume(resolved, folder, changes=changes, callbacks=callbacks, console=console, timings=timings)


def _changes(before: Resolved, after: Resolved) -> dict[str, Any]:
    """The settings that differ, by dotted path. Raises SettingsError for one that decides data or models."""
    old, new = flat(before.as_dict()), flat(after.as_dict())
    changes = {path: new.get(path) for path in {*old, *new} if old.get(path) != new.get(path)}
    if refused := sorted(changes.keys() - CHANGEABLE):
        raise SettingsError(
            [
                f"--set {path}: a run keeps this setting; start a new run to change it. "
                f"--resume takes {', '.join(sorted(CHANGEABLE))}"
                for path in refused
            ]
        )
    return changes
