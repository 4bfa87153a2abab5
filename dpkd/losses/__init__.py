"""The zoo as a library: any installed loss in anybody's training loop.

    from dpkd import losses

    loss_fn = losses.get("jsd", beta=0.1)
    loss = loss_fn(student_logits=s, teacher_logits=t, labels=labels)  # a scalar in nats, with a gradient for s

`labels` are those of transformers: the input ids, with -100 where a token is not trained, and not shifted. The shift,
the mask, the cut of the vocabulary and the division are the functions that `dpkd train` itself calls.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from dpkd.api import LossSpec, PairLoss, RolloutLoss
from dpkd.config.problems import checked
from dpkd.losses.distillation import DistillationLoss
from dpkd.losses.outputs import pair_logps, token_logps
from dpkd.losses.own import as_spec
from dpkd.losses.policy import PolicyLoss
from dpkd.losses.preference import PreferenceLoss
from dpkd.plugins import load_registry

__all__ = ["DistillationLoss", "PolicyLoss", "PreferenceLoss", "available", "get", "pair_logps", "token_logps"]


def available() -> dict[str, str]:
    """The names of all installed losses, each with its summary of one line."""
    return {name: loss.spec.card.summary for name, loss in sorted(load_registry().losses.items())}


def get(
    loss: str | LossSpec | Callable[..., Tensor], /, *, vocabulary: int | None = None, **settings: Any
) -> DistillationLoss | PolicyLoss | PreferenceLoss:
    """Make a loss by its name, with its own settings: `get("jsd", beta=0.1)`.

    loss        a name of `available()`, the spec of a loss of your own, or a function whose arguments are what it reads
                (`student_logits`, `teacher_logits`, `targets`, ...) and, with defaults, its settings
    vocabulary  compare the first so many ids only. Needed where the output heads of student and teacher have different
                sizes (padding): the number of ids that the tokenizer has
    settings    as `dpkd describe NAME` lists them

    Returns a `DistillationLoss` for a loss on tokens, a `PolicyLoss` for one on sampled responses, a `PreferenceLoss`
    for one on pairs. Raises DpkdError for an unknown name, SettingsError for wrong settings.
    """
    spec = load_registry().get(LossSpec, loss).spec if isinstance(loss, str) else as_spec(loss)
    config = checked(spec.config, settings, "loss")
    if issubclass(spec.loss, PairLoss):
        return PreferenceLoss(spec, config, vocabulary)
    if issubclass(spec.loss, RolloutLoss):
        return PolicyLoss(spec, config, vocabulary)
    return DistillationLoss(spec, config, vocabulary)
