"""Optimizers by name, `train.optimizer`: how each is made, its own settings, and how much memory its state takes.

Adding an optimizer is a row of OPTIMIZERS, with a block of settings where it has any. What has no row here is made by
transformers' own factory, under the names of its `OptimizerNames`.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from pydantic import Field, create_model
from torch import nn

from dpkd.models.quantization import quiet_bitsandbytes
from dpkd.settings import Block

FLOAT = 4  # bytes of a float32


class Weight(NamedTuple):
    """A trainable parameter, and whether it is a hidden matrix: two axes, and neither embedding nor output head."""

    parameter: nn.Parameter
    is_hidden_matrix: bool

    @property
    def decays(self) -> bool:
        """No weight decay on biases, norms and other vectors."""
        return self.parameter.ndim >= 2


class Common(NamedTuple):
    """What optimizers share: `train.lr`, `train.weight_decay`, and for AdamW `train.betas` and `train.eps`."""

    lr: float
    weight_decay: float
    betas: tuple[float, float]
    eps: float


class NoSettings(Block):
    """An optimizer without settings of its own."""


class AdafactorSettings(Block):
    """Of Adafactor (Shazeer and Stern, 1804.04235)."""

    beta2_decay: float = Field(-0.8, le=0, description="the second moment decays with 1 - step^beta2_decay")
    clip_threshold: float = Field(1.0, gt=0, description="largest root mean square of an update")


class MuonSettings(Block):
    """Of Muon, on hidden matrices; embeddings, output head, biases and norms get AdamW."""

    momentum: float = Field(0.95, ge=0, lt=1, description="of the gradients")
    nesterov: bool = Field(True, description="Nesterov momentum")
    ns_steps: int = Field(5, ge=1, description="Newton-Schulz iterations")


class SgdSettings(Block):
    """Of stochastic gradient descent."""

    momentum: float = Field(0.9, ge=0, lt=1, description="0: none, and no state")
    nesterov: bool = Field(False, description="Nesterov momentum")


Make = Callable[[Sequence[Weight], Common, Any], torch.optim.Optimizer]


@dataclass(frozen=True)
class OptimizerKind:
    """A row of the table.

    make     from weights, common settings and its own
    bytes_of bytes of state of one weight, given its own settings
    settings its own settings, `train.optimizer_settings`
    """

    summary: str
    make: Make
    bytes_of: Callable[[Weight, Any], float]
    settings: type[Block] = NoSettings


def weights_of(module: nn.Module) -> list[Weight]:
    """The trainable parameters of a module, each once."""
    tables = {p for m in module.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    models: list[Any] = [m for m in module.modules() if hasattr(m, "get_output_embeddings")]
    heads = [model.get_output_embeddings() for model in models]
    tables |= {p for head in heads if head is not None for p in head.parameters()}
    return [Weight(p, p.ndim == 2 and p not in tables) for p in module.parameters() if p.requires_grad]


def state_bytes(module: nn.Module, optimizer: str, settings: Block) -> float:
    """Bytes of the state of an optimizer over the trainable parameters of a module, after its first step."""
    kind = optimizer_kind(optimizer)
    return sum(kind.bytes_of(weight, settings) for weight in weights_of(module))


def _groups(weights: Sequence[Weight], weight_decay: float) -> list[dict[str, Any]]:
    groups: list[dict[str, Any]] = [
        {"params": [w.parameter for w in weights if w.decays], "weight_decay": weight_decay},
        {"params": [w.parameter for w in weights if not w.decays], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _adamw(weights: Sequence[Weight], common: Common, own: Any) -> torch.optim.Optimizer:
    fused = all(w.parameter.device.type in ("cpu", "cuda") for w in weights)
    groups = _groups(weights, common.weight_decay)
    return torch.optim.AdamW(groups, lr=common.lr, betas=common.betas, eps=common.eps, fused=fused)


def _adafactor(weights: Sequence[Weight], common: Common, own: AdafactorSettings) -> torch.optim.Optimizer:
    groups = _groups(weights, common.weight_decay)
    return torch.optim.Adafactor(groups, lr=common.lr, beta2_decay=own.beta2_decay, d=own.clip_threshold)


def _sgd(weights: Sequence[Weight], common: Common, own: SgdSettings) -> torch.optim.Optimizer:
    groups = _groups(weights, common.weight_decay)
    return torch.optim.SGD(groups, lr=common.lr, momentum=own.momentum, nesterov=own.nesterov)


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon on hidden matrices and AdamW on the rest, as one optimizer: one list of groups, one state."""

    def __init__(self, weights: Sequence[Weight], common: Common, own: MuonSettings) -> None:
        hidden = [w.parameter for w in weights if w.is_hidden_matrix]
        rest = [w for w in weights if not w.is_hidden_matrix]
        self._inner = {True: _muon(hidden, common, own) if hidden else None, False: _adamw(rest, common, None)}
        groups = [
            {**group, "muon": muon} for muon, inner in self._inner.items() if inner for group in inner.param_groups
        ]
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update of all parameters. `closure` computes the loss again, as torch's optimizers have it."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for muon, inner in self._inner.items():
            if inner is not None:  # a checkpoint may have replaced groups and state since
                inner.param_groups = [group for group in self.param_groups if group["muon"] is muon]
                inner.state = self.state
                inner.step()
        return loss


def _muon(hidden: list[nn.Parameter], common: Common, own: MuonSettings) -> torch.optim.Optimizer:
    # With updates scaled to the root mean square of AdamW's, a rate that suits AdamW suits Muon (2502.16982).
    return torch.optim.Muon(
        hidden,
        lr=common.lr,
        weight_decay=common.weight_decay,
        momentum=own.momentum,
        nesterov=own.nesterov,
        ns_steps=own.ns_steps,
        adjust_lr_fn="match_rms_adamw",
    )


def _two_moments(weight: Weight, own: Any) -> float:
    return 2.0 * FLOAT * weight.parameter.numel()


def _factored(weight: Weight, own: Any) -> float:
    """The second moment as its row and column means; whole for vectors."""
    *batch, rows, columns = (1, *weight.parameter.shape) if weight.decays else (1, weight.parameter.numel(), 0)
    return float(FLOAT * torch.Size(batch).numel() * (rows + columns))


def _momentum(weight: Weight, own: Any) -> float:
    return float(FLOAT * weight.parameter.numel()) if getattr(own, "momentum", 1.0) else 0.0


def _muon_state(weight: Weight, own: MuonSettings) -> float:
    size = float(FLOAT * weight.parameter.numel())
    return size if weight.is_hidden_matrix else 2 * size


OPTIMIZERS: dict[str, OptimizerKind] = {
    "adamw": OptimizerKind("AdamW, fused where the device has it", _adamw, _two_moments),
    "adafactor": OptimizerKind("Adafactor: factored second moment, no first", _adafactor, _factored, AdafactorSettings),
    "muon": OptimizerKind("Muon on hidden matrices, AdamW on the rest", MuonWithAdamW, _muon_state, MuonSettings),
    "sgd": OptimizerKind("gradient descent with momentum", _sgd, _momentum, SgdSettings),
}


def optimizer_kind(name: str) -> OptimizerKind:
    """The optimizer of a name: a row of the table, else one of transformers' factory.

    Raises ValueError for a name that neither has, and where its package is not installed.
    """
    return OPTIMIZERS[name] if name in OPTIMIZERS else _of_transformers(name)


# Of transformers' names: these need the model, hooks in the backward pass, modes of their own, or another device.
_REFUSED = ("galore", "apollo", "lomo", "adalomo", "schedule_free", "adamw_torch_xla", "adamw_torch_npu")
# What `train.lr` and its like, or the name itself, decide.
_DECIDED = frozenset({"params", "lr", "weight_decay", "optim_bits", "is_paged", "fused", "args"})
_STAND_IN = 2**16  # values of the largest tensor on which a state is measured


@cache
def _of_transformers(name: str) -> OptimizerKind:
    """An optimizer of `Trainer.get_optimizer_cls_and_kwargs`; its settings are the arguments of its class."""
    with quiet_bitsandbytes():
        from transformers.training_args import OptimizerNames

    asked = {"lion": "lion_32bit"}.get(name, name)
    known = [one.value for one in OptimizerNames if not one.value.startswith(_REFUSED)]
    if asked not in known:
        names = list(dict.fromkeys([*OPTIMIZERS, "lion", *known]))
        near = get_close_matches(name[:100], names, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"should be one of {', '.join(names)} (got {name[:100]!r}{hint})")
    try:
        cls, _ = _made_by_transformers(asked, Common(1e-3, 0.0, (0.9, 0.999), 1e-8))
    except (ImportError, ValueError) as error:
        raise ValueError(f"{name} cannot be used here: {error}") from error
    # Chen et al., 2302.06675: what Lion's moments should be is not what Adam's are.
    defaults = {"betas": (0.9, 0.99)} if "lion" in asked else {}
    arguments = [argument for argument in inspect.signature(cls).parameters if argument not in _DECIDED]
    fields: Any = {
        argument: (Any, Field(defaults.get(argument), description=f"argument of {cls.__name__}; None: as transformers"))
        for argument in arguments
    }

    def make(weights: Sequence[Weight], common: Common, own: Block) -> torch.optim.Optimizer:
        _, kwargs = _made_by_transformers(asked, common)
        given = {key: value for key, value in own.model_dump().items() if value is not None}
        return cls(_groups(weights, common.weight_decay), **{**kwargs, **given})

    def bytes_of(weight: Weight, own: Block) -> float:
        size = min(weight.parameter.numel(), _STAND_IN)
        return weight.parameter.numel() / size * _measured(make, size, own)

    settings = create_model(f"{cls.__name__}Settings", __base__=Block, **fields)
    return OptimizerKind(f"{cls.__name__} by transformers", make, bytes_of, settings)


def _made_by_transformers(name: str, common: Common) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """Class and arguments of an optimizer. Raises ImportError or ValueError where its package is not installed."""
    with quiet_bitsandbytes():  # transformers imports it where it is installed
        from transformers import Trainer

    arguments: Any = SimpleNamespace(
        optim=name,
        optim_args=None,
        learning_rate=common.lr,
        weight_decay=common.weight_decay,
        adam_beta1=common.betas[0],
        adam_beta2=common.betas[1],
        adam_epsilon=common.eps,
    )
    with quiet_bitsandbytes():
        cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(arguments)
    return cls, {key: value for key, value in kwargs.items() if key != "weight_decay"}


def _measured(make: Make, size: int, own: Block) -> float:
    """Bytes of the state of a tensor after an update; where the CPU has no such update, two moments in float32."""
    parameter = nn.Parameter(torch.zeros(size))
    parameter.grad = torch.zeros(size)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # paged states are a matter of GPUs
            optimizer = make([Weight(parameter, False)], Common(1e-3, 0.0, (0.9, 0.999), 1e-8), own)
            optimizer.step()
    except Exception:  # of a package that knows GPUs only: a plan must not fail for it
        return 2.0 * FLOAT * size
    state = optimizer.state[parameter].items()
    # One table (qmap) serves all parameters.
    return float(sum(v.nbytes for k, v in state if torch.is_tensor(v) and v.ndim > 0 and not k.startswith("qmap")))
