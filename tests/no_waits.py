"""A mode for tests that finds operators at which the host would wait for a GPU."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode

WAITS = {"_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "_unique2", "unique_dim", "equal", "item"}
BY_MASK = {"index", "index_put", "index_put_", "_index_put_impl_"}  # with a mask they look how many are true


class NoWaits(TorchDispatchMode):
    """Fails on an operator that would wait for a device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        masks = [i for i in args[1] if i is not None] if name in BY_MASK else []
        assert name not in WAITS, f"the host waits at {name}"
        assert all(i.dtype is not torch.bool for i in masks), f"the host waits at {name} with a mask"
        return func(*args, **(kwargs or {}))
