"""Checkpoints: everything that decides the next step, in safetensors and JSON, written whole or not at all.

    step-00000008/weights.safetensors, optimizer.safetensors, random-RANK.safetensors, sources.json
    step-00000008/state.json   step, processes, the loop's own state, and the SHA-256 of each of these files

A checkpoint is never written over, and one whose checksums are wrong is never loaded.
"""

from __future__ import annotations

import json
import re
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dpkd.errors import DpkdError
from dpkd.io import (
    JsonLog,
    digest,
    dumps,
    read_json,
    remove_folder,
    sha256,
    storage_errors,
    whole_folder,
    with_non_finite,
    write_json,
)
from dpkd.models.sharding import put, whole
from dpkd.train.nonfinite import ADVICE, NotFinite
from dpkd.train.zero import Zero

FORMAT = 4
UNVERIFIED = (2, 3)  # formats without checksums
SAVE_SECONDS = 600.0  # between checkpoints where `save_every` is auto
_NAME = re.compile(r"step-(\d{8})")


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk, after so many optimizer steps."""

    path: Path
    step: int


def _trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def _optimiser_tensors(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], zero: Zero | None, *, keep: bool
) -> dict[str, Tensor]:
    """The optimizer's state; where it is not kept, this process only takes part in gathering it."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        own = optimizer.state.get(parameter, {}) if zero is None else zero.optimizer_state(parameter)
        for key, value in own.items():
            found = whole(torch.as_tensor(value))
            if not keep:
                continue
            found = found.cpu().contiguous()
            # Tables of an 8-bit state belong to all parameters, and a file of safetensors has each tensor once.
            tensors[f"{name}|{key}"] = found if found.shape == parameter.shape else found.clone()
    return tensors


def random_state(device: torch.device) -> dict[str, Tensor]:
    """State of this process's random numbers."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: Mapping[str, Tensor], device: torch.device) -> None:
    """The inverse of `random_state`."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def save(
    folder: Path,
    step: int,
    *,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    zero: Zero | None = None,
    sources: Mapping[str, Mapping[str, Any]],
    loop: Mapping[str, Any],
    random_states: list[dict[str, Tensor]],
    is_main: bool,
) -> Checkpoint:
    """Write `folder/step-N`, unless it is there. All processes call it, one writes.

    Raises NotFinite when a weight is not finite: such a state is worth nothing; StorageError when the disk is full.
    """
    parameters = _trainable(module)
    weights: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        found = whole(parameter)
        _check_finite(name, found)  # in every process: all stop, or none
        if is_main:  # the others take part in gathering, and copy nothing
            weights[name] = found.cpu().contiguous()
    optimiser_state = _optimiser_tensors(optimizer, parameters, zero, keep=is_main)
    final = folder / f"step-{step:08d}"
    if not is_main or final.is_dir():
        return Checkpoint(final, step)
    with whole_folder(final) as unfinished:
        save_file(weights, unfinished / "weights.safetensors")
        save_file(optimiser_state, unfinished / "optimizer.safetensors")
        for rank, state in enumerate(random_states):
            save_file(state, unfinished / f"random-{rank}.safetensors")
        write_json(unfinished / "sources.json", sources)
        hashes = {file.name: sha256(file) for file in sorted(unfinished.iterdir())}
        facts = {"format": FORMAT, "step": step, "processes": len(random_states), "loop": loop, "files": hashes}
        facts = json.loads(dumps(facts))  # as it will be read: keys are texts, tuples are lists
        write_json(unfinished / "state.json", facts | {"check": digest(facts)})
    return Checkpoint(final, step)


def check_finite(module: nn.Module) -> None:
    """Raises NotFinite when a weight is not finite."""
    for name, parameter in _trainable(module).items():
        _check_finite(name, whole(parameter))


def _check_finite(name: str, weight: Tensor) -> None:
    if not bool(torch.isfinite(weight).all()):
        raise NotFinite(f"the weight {name} is not finite, so no checkpoint of it is saved. {ADVICE}")


def _all(folder: Path) -> list[Checkpoint]:
    """From the newest on; half-written ones have another name."""
    found = [
        Checkpoint(path, int(match[1]))
        for path in (folder.iterdir() if folder.is_dir() else [])
        if (match := _NAME.fullmatch(path.name))
    ]
    return sorted(found, key=lambda c: c.step, reverse=True)


def latest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint; whether its files are as they were written is not looked at."""
    return next((one for one in _all(folder) if (one.path / "state.json").is_file()), None)


def steps(folder: Path) -> list[int]:
    """The steps that there are checkpoints of."""
    return [one.step for one in _all(folder)]


def newest_whole(folder: Path, say: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint whose checksums are right; damaged ones are set aside as `NAME.damaged`, and named.

    Raises DpkdError when all of them are damaged, or another version of dpkd wrote one.
    """
    damaged: list[Checkpoint] = []
    for one in _all(folder):
        problem = _problem(one)
        if problem is None:
            for other in damaged:
                other.path.rename(other.path.with_name(f"{other.path.name}.damaged"))
            return one
        damaged.append(one)
        say(f"the checkpoint {one.path} is damaged: {problem}")
    if damaged:
        raise DpkdError(
            f"no checkpoint in {folder} is whole. Delete that folder to train this run from its first step, "
            "or put back what is damaged."
        )
    return None


def _problem(checkpoint: Checkpoint) -> str | None:
    """What is damaged in a checkpoint, in words. Raises DpkdError for one of another version."""
    try:
        facts = read_json(checkpoint.path / "state.json")
        if "check" not in facts and facts.get("format") in UNVERIFIED:
            return None
        if facts.get("format") != FORMAT and "check" not in facts:
            raise ForeignFormat(
                f"the checkpoint {checkpoint.path} has format {facts.get('format')}, expected {FORMAT}: another "
                "version of dpkd wrote it. Continue with that version, or start a new run."
            )
        check = facts.pop("check", None)
        if check != digest(facts):
            return "state.json has a wrong checksum"
        for name, expected in facts["files"].items():
            with storage_errors(checkpoint.path / name):
                if sha256(checkpoint.path / name) != expected:
                    return f"{name} has a wrong checksum"
    except ForeignFormat:
        raise
    except DpkdError as error:
        return str(error)
    return None


class ForeignFormat(DpkdError):
    """A checkpoint of another version of dpkd."""


def prune(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints."""
    for one in _all(folder)[keep:]:
        remove_folder(one.path)


@dataclass
class SaveClock:
    """When to save between steps: every so many, or (auto) when the last time is ten minutes ago."""

    every: int | Literal["auto"] | None
    last: float = field(default_factory=time.monotonic)

    def due(self, done: int) -> bool:
        """Whether to save after `done` steps."""
        if self.every == "auto":
            return time.monotonic() - self.last >= SAVE_SECONDS
        return self.every is not None and done % self.every == 0

    def saved(self) -> None:
        """Note that a checkpoint was written just now."""
        self.last = time.monotonic()


@torch.no_grad()
def load(
    checkpoint: Checkpoint,
    *,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    zero: Zero | None = None,
    rank: int,
    processes: int,
    device: torch.device,
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Put a checkpoint that is whole into module, optimizer and random numbers; returns what else the loop needs.

    That is the state of each response source, by group of losses, and of the loop what was measured but not yet logged,
    and where schedules that follow the loss are.
    Raises DpkdError when it does not fit: another model.
    """
    state = read_json(checkpoint.path / "state.json")
    with storage_errors(checkpoint.path):
        weights = load_file(checkpoint.path / "weights.safetensors")
        optimiser_state = load_file(checkpoint.path / "optimizer.safetensors")
    parameters = _trainable(module)
    if set(parameters) != set(weights):
        odd = sorted(set(parameters) ^ set(weights))[:3]
        raise DpkdError(f"the checkpoint {checkpoint.path} is of another model: it differs in {', '.join(odd)}")
    for name, parameter in parameters.items():
        put(parameter, weights[name])
    states: dict[nn.Parameter, dict[str, Tensor]] = defaultdict(dict)
    for key, value in optimiser_state.items():
        name, _, what = key.rpartition("|")
        states[parameters[name]][what] = value
    if zero is not None and states:
        zero.put_optimizer_state(states)
    elif zero is None:
        for parameter, own in states.items():
            optimizer.state[parameter] = {key: _restored(parameter, value) for key, value in own.items()}
    if state["processes"] == processes:
        random = load_file(checkpoint.path / f"random-{rank}.safetensors")
        set_random_state(random, device)
    return _sources(checkpoint.path, state), with_non_finite(state["loop"])


def _sources(folder: Path, state: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The state of the sources; format 2 had it in two places."""
    if state.get("format") != 2:
        found: dict[str, dict[str, Any]] = with_non_finite(read_json(folder / "sources.json"))
        return found
    responses: defaultdict[str, dict[int, list[Any]]] = defaultdict(dict)
    for row in JsonLog(folder / "responses.jsonl").rows():
        responses[row.pop("group")].setdefault(row.pop("example"), []).append(row)
    adaptive = state["loop"].get("adaptive", {})
    return defaultdict(
        lambda: {"responses": []},
        {group: {"responses": [*map(list, written.items())]} for group, written in responses.items()} | adaptive,
    )


def _restored(parameter: Tensor, value: Tensor) -> Any:
    """A value of an optimizer's state: a count, a tensor laid out like its parameter, or another of its own shape."""
    if value.ndim == 0:
        return value if value.is_floating_point() else int(value)
    if value.shape != parameter.shape:
        return value.to(parameter.device)
    target = torch.empty_like(parameter, dtype=value.dtype)
    put(target, value)
    return target
