"""`dpkd train` with the student sharded by FSDP 2 over CPU processes; accelerate shards on accelerators only."""

from __future__ import annotations

from accelerate import Accelerator
from torch.distributed.fsdp import fully_shard

from dpkd.cli.main import main
from dpkd.models import compile as compiling
from dpkd.models.head import causal_lm
from dpkd.train import build as run_parts

make_optimizer = run_parts.make_optimizer


def shard_first(loss_module, settings):
    """As accelerate does: each layer is a group, all else is the root's."""
    for layer in causal_lm(loss_module.student).base_model.layers:
        fully_shard(layer)
    fully_shard(loss_module)
    return make_optimizer(loss_module, settings)


if __name__ == "__main__":
    compiling.BACKEND = "eager"  # a CPU may have no C++ compiler
    run_parts.make_optimizer = shard_first
    Accelerator.prepare = lambda self, *parts: parts
    main()
