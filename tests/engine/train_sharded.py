"""`dpkd train` with the student sharded by FSDP 2 over CPU processes; accelerate shards on accelerators only."""

from __future__ import annotations

from accelerate import Accelerator
from torch.distributed.fsdp import fully_shard

import dpkd.engine.assembly as assembly
from dpkd.cli.main import main
from dpkd.models.head import causal_lm

make_optimiser = assembly.make_optimiser


def shard_first(distiller, settings):
    """As accelerate does: each layer is a group, all else is the root's."""
    for layer in causal_lm(distiller.student).base_model.layers:
        fully_shard(layer)
    fully_shard(distiller)
    return make_optimiser(distiller, settings)


if __name__ == "__main__":
    assembly.make_optimiser = shard_first
    Accelerator.prepare = lambda self, *parts: parts
    main()
