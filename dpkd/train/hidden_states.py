"""Losses on hidden states: told what the models are like, they make their weights and name the layers they read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from dpkd.api import HIDDEN, Family, Layers, Signal, Stack
from dpkd.config.objective import Objective
from dpkd.config.resolve import Resolved
from dpkd.errors import DpkdError
from dpkd.models.head import causal_lm, hidden_states
from dpkd.models.layers import every_state, stack_of


def bind(
    resolved: Resolved, losses: Mapping[str, Any], student_config: Any, teacher_config: Any | None
) -> dict[str, Layers]:
    """Have each loss on hidden states make its weights; the layers that it reads, by the name of the loss.

    Raises DpkdError when a loss does not fit the models, or asks for what the engine does not give together.
    """
    student = stack_of(student_config)
    teacher = Stack(0, 0) if teacher_config is None else stack_of(teacher_config)
    found = {}
    for objective in resolved.objectives:
        if not HIDDEN & objective.reads:
            continue
        _check_reads(objective)
        # The first weights depend on the seed alone, not on what was drawn before.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(resolved.settings.seed)
            try:
                layers = losses[objective.name].bind(student, teacher)
            except (ValueError, NotImplementedError) as error:
                raise DpkdError(f"the loss {objective.spec.name} does not fit the models: {error}") from error
        _check_layers(objective.spec.name, layers, student, teacher)
        found[objective.name] = layers
    return found


def _check_reads(objective: Objective) -> None:
    allowed = HIDDEN | {Signal.TARGETS}
    if objective.spec.family is not Family.TOKEN or not objective.reads <= allowed:
        others = ", ".join(sorted(objective.reads - allowed)) or f"the signals of a {objective.spec.family} loss"
        raise DpkdError(
            f"the loss {objective.spec.name} reads hidden states beside {others}: logits come a few rows at a time, "
            "hidden states all at once. Make it two token losses, and put one beside the other with terms.extra"
        )


def _check_layers(name: str, layers: Layers, student: Stack, teacher: Stack) -> None:
    for who, asked, stack in (("student", layers.student, student), ("teacher", layers.teacher, teacher)):
        outside = [i for i in asked if not 0 <= i <= stack.layers]
        if outside:
            raise DpkdError(
                f"the loss {name} asks for the hidden state {outside[0]} of the {who}, which has 0 (the embedding) to "
                f"{stack.layers} (the last)"
            )


@torch.no_grad()
def check_stack(model: nn.Module | None) -> None:
    """Compare the hidden states of a probe with what the model's configuration says of them.

    Raises DpkdError when a model has another number of states, or states of several widths.
    """
    if model is None:
        return
    lm = causal_lm(model)
    expected, device = stack_of(lm.config), next(lm.parameters()).device
    ids = torch.arange(4, 8, device=device).remainder(lm.get_input_embeddings().weight.shape[0]).unsqueeze(0)
    with every_state(model) as states:
        hidden_states(model, ids, torch.ones_like(ids), torch.arange(4, device=device).unsqueeze(0))
    widths = {state.shape[-1] for state in states}
    if len(states) != expected.layers + 1 or widths != {expected.width}:
        raise DpkdError(
            f"{type(lm).__name__} gives {len(states)} hidden states of widths {sorted(widths)}, where its "
            f"configuration says {expected.layers} + 1 of width {expected.width}: a loss on hidden states cannot use it"
        )
