"""An exponential moving average of the trained weights (`train.ema`).

It lives in the optimizer's state, under `ema`: so it is sharded as the weights are, and checkpoints hold it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

KEY = "ema"


def follow(optimizer: torch.optim.Optimizer, decay: float) -> None:
    """After every update, move the average by 1 - decay towards the weights; it begins as those of the first step."""

    @torch.no_grad()
    def update(done: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for parameter in (p for group in done.param_groups for p in group["params"]):
            state = done.state[parameter]
            if KEY in state:
                state[KEY].lerp_(parameter.detach(), 1 - decay)
            else:
                state[KEY] = parameter.detach().clone()

    optimizer.register_step_post_hook(update)


@contextmanager
def averaged(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """For the time of the block the weights are their averages, where there are any."""
    pairs = [(p, state[KEY]) for p, state in optimizer.state.items() if KEY in state]
    _exchange(pairs)
    try:
        yield
    finally:
        _exchange(pairs)


@torch.no_grad()
def _exchange(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    for parameter, average in pairs:
        own = parameter.detach().clone()
        parameter.copy_(average)
        average.copy_(own)
