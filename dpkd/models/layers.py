"""The hidden states of every layer, from the one forward that gives the last.

Shapes: B sequences, T tokens, N response positions, H hidden. State 0 is the embedding, the last what the head reads.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from dpkd.api import Stack
from dpkd.models.captured import paused
from dpkd.models.head import causal_lm, hidden_rows

if TYPE_CHECKING:
    from dpkd.data.batches import Batch


def stack_of(config: Any) -> Stack:
    """What the configuration of a model says of its hidden states."""
    text = config.get_text_config()
    return Stack(text.num_hidden_layers, text.hidden_size)


@contextmanager
def every_state(model: nn.Module) -> Iterator[list[Tensor]]:
    """A list that has the hidden states `[B, T, H]` of all layers after a forward of the backbone inside the block."""
    backbone = causal_lm(model).base_model
    states: list[Tensor] = []

    def ask(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "output_hidden_states": True}

    def keep(_module: nn.Module, _args: Any, output: Any) -> None:
        states[:] = output.hidden_states

    handles = [backbone.register_forward_pre_hook(ask, with_kwargs=True), backbone.register_forward_hook(keep)]
    try:
        with paused(causal_lm(model)):
            yield states
    finally:
        for handle in handles:
            handle.remove()


def layer_rows(model: nn.Module, batch: Batch, layers: Collection[int]) -> tuple[Tensor, dict[int, Tensor]]:
    """The hidden states `[N, H]` that the head reads, and those of some layers, by their number; one forward."""
    if not layers:
        return hidden_rows(model, batch), {}
    with every_state(model) as states:
        hidden = hidden_rows(model, batch)
    return hidden, {i: states[i].flatten(0, 1).index_select(0, batch.rows) for i in layers}
