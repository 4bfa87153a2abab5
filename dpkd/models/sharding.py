"""Models whose weights FSDP 2 or DeepSpeed's ZeRO has spread over the processes, for work that is not training."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule


@dataclass(frozen=True)
class Sharding:
    """Over how many processes `accelerate launch` has the student spread, and which parts of it.

    parts      of `weights`, `gradients` and `optimizer`
    elsewhere  of these, what is kept on the CPU
    copies     whether the optimizer updates a copy of the weights that lies with its state
    """

    processes: int = 1
    parts: frozenset[str] = frozenset()
    elsewhere: frozenset[str] = frozenset()
    copies: bool = False

    def held(self, part: str, size: float) -> float:
        """What one process holds on its device, of a part of this size."""
        if part in self.elsewhere:
            return 0.0
        return size / self.processes if part in self.parts else size


def sharding() -> Sharding:
    """What `accelerate launch` tells each process; all is whole where it tells nothing."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if _is_on("ACCELERATE_USE_FSDP"):
        return Sharding(processes, frozenset(("weights", "gradients", "optimizer")))
    if (config := zero_config()) is not None:
        zero = config["zero_optimization"]
        parts = ("optimizer", "gradients", "weights")[: zero["stage"]]
        offloads = {"optimizer": "offload_optimizer", "weights": "offload_param"}
        elsewhere = [part for part, key in offloads.items() if (zero.get(key) or {}).get("device") == "cpu"]
        return Sharding(processes, frozenset(parts), frozenset(elsewhere), copies=True)
    return Sharding()


def zero_config() -> dict[str, Any] | None:
    """DeepSpeed's configuration as `accelerate launch --use_deepspeed` gives it; None where ZeRO is not asked for.

    Stage 0 of ZeRO is plain data parallelism, for which DeepSpeed is not needed.
    """
    if not _is_on("ACCELERATE_USE_DEEPSPEED"):
        return None
    from accelerate.utils import DeepSpeedPlugin

    config: dict[str, Any] = DeepSpeedPlugin().deepspeed_config
    return config if config["zero_optimization"]["stage"] else None


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "true")


def _shards(module: nn.Module) -> list[FSDPModule]:
    return [part for part in module.modules() if isinstance(part, FSDPModule)]


def _partitioned(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that stage 3 of ZeRO has partitioned: DeepSpeed marks them with an id."""
    return [p for p in module.parameters() if hasattr(p, "ds_id")]


def is_sharded(module: nn.Module) -> bool:
    """Whether the weights of a module are spread over the processes."""
    return bool(_shards(module) or _partitioned(module))


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Whole weights for the time of the block: forwards in it exchange nothing, so that processes may differ in them.

    All processes enter it together; with FSDP 2 from within a forward of the outermost sharded module. Costs a whole
    copy of the weights on each process. Nothing happens to a module that is not sharded.
    """
    shards = _shards(module)
    for part in shards:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        with _gathered_by_zero(_partitioned(module)):
            yield
    finally:
        for part in shards:
            part.reshard()
            part.set_reshard_after_forward(True, recurse=False)


@contextmanager
def _gathered_by_zero(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Whole parameters, and no hooks: they would partition the weights again behind each layer that has run."""
    if not parameters:
        yield
        return
    from deepspeed.runtime.zero import GatheredParameters

    trained: Any = next(p for p in parameters if hasattr(p, "_z3_optimizer"))
    offload = trained._z3_optimizer.parameter_offload
    with GatheredParameters(parameters):
        offload._remove_module_hooks()
        offload.forward_hooks.clear()
        offload.backward_hooks.clear()
        try:
            yield
        finally:
            offload.setup_zero_stage3_hooks()


def whole(tensor: Tensor) -> Tensor:
    """A whole parameter, or another tensor that lies as one; the processes that hold parts of it call this together."""
    if hasattr(tensor, "ds_id"):
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([tensor]):
            return tensor.detach().clone()
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach()


def put(target: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into a parameter, also into a sharded one; all processes call this together."""
    if hasattr(target, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor

        sharded: Any = target
        value = distribute_tensor(value.to(target.device), sharded.device_mesh, sharded.placements)
    with _changed_by_zero(target):
        target.detach().copy_(value)
    if hasattr(target, "ds_id") or hasattr(target, "_hp_mapping"):  # what the optimizer updates is a copy
        from deepspeed.utils import safe_set_full_fp32_param

        safe_set_full_fp32_param(target, value.to(target.device, torch.float32))


def _changed_by_zero(target: Tensor) -> AbstractContextManager[None]:
    if not hasattr(target, "ds_id"):
        return nullcontext()
    from deepspeed.runtime.zero import GatheredParameters

    return GatheredParameters([target], modifier_rank=0)  # type: ignore[no-any-return]
