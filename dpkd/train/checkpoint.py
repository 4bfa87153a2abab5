"""Checkpoints: everything that decides the next step, in safetensors and JSON, written whole or not at all."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dpkd.errors import DpkdError

FORMAT = 3
_NAME = re.compile(r"step-(\d{8})")


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk, after so many optimizer steps."""

    path: Path
    step: int


class Restored(NamedTuple):
    """What the loop needs beside the weights.

    sources  the state of each response source, by group of losses
    loop     what was measured but not yet logged, and where schedules that follow the loss are
    """

    sources: dict[str, dict[str, Any]]
    loop: dict[str, Any]


def _full(tensor: Tensor) -> Tensor:
    """The whole tensor on the CPU, also of a sharded parameter."""
    whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole.detach().cpu().contiguous()


def _put(target: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into a parameter, also into a sharded one."""
    if hasattr(target, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor

        sharded: Any = target
        value = distribute_tensor(value.to(target.device), sharded.device_mesh, sharded.placements)
    target.detach().copy_(value)


def _trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def _optimiser_tensors(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    tensors = {}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            whole = _full(torch.as_tensor(value))
            # Tables of an 8-bit state belong to all parameters, and a file of safetensors has each tensor once.
            tensors[f"{name}|{key}"] = whole if whole.shape == parameter.shape else whole.clone()
    return tensors


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
    sources: Mapping[str, Mapping[str, Any]],
    loop: Mapping[str, Any],
    random_states: list[dict[str, Tensor]],
    is_main: bool,
) -> Checkpoint:
    """Write `folder/step-N`: to a temporary folder, flushed, then renamed. All processes call it, one writes."""
    parameters = _trainable(module)
    weights = {name: _full(p) for name, p in parameters.items()}
    optimiser_state = _optimiser_tensors(optimizer, parameters)
    final = folder / f"step-{step:08d}"
    if not is_main:
        return Checkpoint(final, step)
    temporary = folder / f".step-{step:08d}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file(weights, temporary / "weights.safetensors")
    save_file(optimiser_state, temporary / "optimizer.safetensors")
    for rank, state in enumerate(random_states):
        save_file(state, temporary / f"random-{rank}.safetensors")
    (temporary / "sources.json").write_text(json.dumps(sources), encoding="utf-8")
    facts = {"step": step, "processes": len(random_states), "loop": loop, "format": FORMAT}
    (temporary / "state.json").write_text(json.dumps(facts))
    for path in temporary.iterdir():
        _sync(path)
    _sync(temporary)
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
    _sync(folder)
    return Checkpoint(final, step)


def latest(folder: Path) -> Checkpoint | None:
    """The newest whole checkpoint; half-written ones have another name and are never chosen."""
    found = [
        Checkpoint(path, int(match[1]))
        for path in (folder.iterdir() if folder.is_dir() else [])
        if (match := _NAME.fullmatch(path.name)) and (path / "state.json").is_file()
    ]
    return max(found, key=lambda c: c.step, default=None)


def prune(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints."""
    names = sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name))
    for path in names[:-keep]:
        shutil.rmtree(path)


@torch.no_grad()
def load(
    checkpoint: Checkpoint,
    *,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    rank: int,
    processes: int,
    device: torch.device,
) -> Restored:
    """Put a checkpoint into module, optimizer and random numbers; returns what else the loop needs.

    Raises DpkdError when it does not fit: another model, or another number of processes.
    """
    try:
        state: dict[str, Any] = json.loads((checkpoint.path / "state.json").read_text())
        weights = load_file(checkpoint.path / "weights.safetensors")
        optimiser_state = load_file(checkpoint.path / "optimizer.safetensors")
        sources = _sources(checkpoint.path, state)
        if state.get("format") not in (2, FORMAT):
            raise ValueError(f"format {state.get('format')}, expected {FORMAT}: another version of dpkd wrote it")
    except (OSError, ValueError, SafetensorError) as error:
        raise DpkdError(
            f"the checkpoint {checkpoint.path} cannot be read ({error}). "
            "Delete that folder to go on from an earlier one."
        ) from error
    parameters = _trainable(module)
    if set(parameters) != set(weights):
        odd = sorted(set(parameters) ^ set(weights))[:3]
        raise DpkdError(f"the checkpoint {checkpoint.path} is of another model: it differs in {', '.join(odd)}")
    for name, parameter in parameters.items():
        _put(parameter, weights[name])
    for name, parameter in parameters.items():
        own = {key.rsplit("|", 1)[1]: value for key, value in optimiser_state.items() if key.rsplit("|", 1)[0] == name}
        if own:
            optimizer.state[parameter] = {key: _restored(parameter, value) for key, value in own.items()}
    if state["processes"] == processes:
        random = load_file(checkpoint.path / f"random-{rank}.safetensors")
        set_random_state(random, device)
    return Restored(sources, state["loop"])


def _sources(folder: Path, state: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The state of the sources; format 2 had it in two places."""
    if state.get("format") != 2:
        found: dict[str, dict[str, Any]] = json.loads((folder / "sources.json").read_text(encoding="utf-8"))
        return found
    responses: defaultdict[str, dict[int, list[Any]]] = defaultdict(dict)
    for row in map(json.loads, (folder / "responses.jsonl").read_text(encoding="utf-8").splitlines()):
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
    return _like(parameter, value) if value.shape == parameter.shape else value.to(parameter.device)


def _like(parameter: Tensor, value: Tensor) -> Tensor:
    """A whole tensor laid out like a parameter."""
    target = torch.empty_like(parameter, dtype=value.dtype)
    _put(target, value)
    return target
