"""Models whose weights FSDP has spread over the processes, for work that is not training."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.distributed.fsdp import FSDPModule


def processes_of_shards() -> int:
    """Over how many processes FSDP will spread the student, as `accelerate launch` tells each; 1: it is not sharded."""
    sharded = os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true")
    return int(os.environ.get("WORLD_SIZE", "1")) if sharded else 1


def _shards(module: nn.Module) -> list[FSDPModule]:
    return [part for part in module.modules() if isinstance(part, FSDPModule)]


def is_sharded(module: nn.Module) -> bool:
    """Whether FSDP has spread weights of a module over the processes."""
    return bool(_shards(module))


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Whole weights for the time of the block: forwards in it exchange nothing, so that processes may differ in them.

    All processes enter it together, from within a forward of the outermost sharded module. Costs a whole copy of the
    weights on each process. Nothing happens to a module that is not sharded (by FSDP 2).
    """
    shards = _shards(module)
    for part in shards:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in shards:
            part.reshard()
            part.set_reshard_after_forward(True, recurse=False)
