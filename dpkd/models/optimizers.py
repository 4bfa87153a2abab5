"""Optimizers by name, `train.optimizer`: how each is made, its own settings, and how much memory its state takes.

Adding an optimizer is a row of OPTIMIZERS, with a block of settings where it has any.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from pydantic import Field
from torch import nn

from dpkd.settings import Block

FLOAT = 4  # bytes of a float32
BLOCK = 256  # values that share a scale in an 8-bit state


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


class EightBitSettings(Block):
    """Of optimizers with 8-bit state."""

    min_8bit_size: int = Field(4096, ge=1, description="tensors with fewer values keep a 32-bit state")


class AdafactorSettings(Block):
    """Of Adafactor (Shazeer and Stern, 1804.04235)."""

    beta2_decay: float = Field(-0.8, le=0, description="the second moment decays with 1 - step^beta2_decay")
    clip_threshold: float = Field(1.0, gt=0, description="largest root mean square of an update")


class LionSettings(Block):
    """Of Lion (Chen et al., 2302.06675)."""

    betas: tuple[float, float] = Field((0.9, 0.99), description="of the update and of the momentum")


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
    package  what it needs beside torch
    """

    summary: str
    make: Make
    bytes_of: Callable[[Weight, Any], float]
    settings: type[Block] = NoSettings
    package: str | None = None

    def missing(self) -> str | None:
        """Why it cannot be used here, and what to do; None: it can."""
        if self.package is None or find_spec(self.package) is not None:
            return None
        return f"needs the package {self.package}, which is not installed: pip install {self.package}"


def weights_of(module: nn.Module) -> list[Weight]:
    """The trainable parameters of a module, each once."""
    tables = {p for m in module.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    models: list[Any] = [m for m in module.modules() if hasattr(m, "get_output_embeddings")]
    heads = [model.get_output_embeddings() for model in models]
    tables |= {p for head in heads if head is not None for p in head.parameters()}
    return [Weight(p, p.ndim == 2 and p not in tables) for p in module.parameters() if p.requires_grad]


def state_bytes(module: nn.Module, optimizer: str, settings: Block) -> float:
    """Bytes of the state of an optimizer over the trainable parameters of a module, after its first step."""
    return sum(OPTIMIZERS[optimizer].bytes_of(weight, settings) for weight in weights_of(module))


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


def _bitsandbytes(name: str) -> Make:
    """AdamW of bitsandbytes, under one of its names."""

    def make(weights: Sequence[Weight], common: Common, own: EightBitSettings) -> torch.optim.Optimizer:
        import bitsandbytes

        optimizer: torch.optim.Optimizer = getattr(bitsandbytes.optim, name)(
            _groups(weights, common.weight_decay),
            lr=common.lr,
            betas=common.betas,
            eps=common.eps,
            min_8bit_size=own.min_8bit_size,
        )
        return optimizer

    return make


def _lion(weights: Sequence[Weight], common: Common, own: LionSettings) -> torch.optim.Optimizer:
    import bitsandbytes

    lion: Any = bitsandbytes.optim.Lion  # type: ignore[attr-defined]
    optimizer: torch.optim.Optimizer = lion(_groups(weights, common.weight_decay), lr=common.lr, betas=own.betas)
    return optimizer


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


def _eight_bit(weight: Weight, own: EightBitSettings) -> float:
    """Two moments of a byte a value, and a scale a block."""
    size = weight.parameter.numel()
    if size < own.min_8bit_size:
        return 2.0 * FLOAT * size
    return 2.0 * (size + FLOAT * -(-size // BLOCK))


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
    "adamw_8bit": OptimizerKind(
        "AdamW with 8-bit state", _bitsandbytes("AdamW8bit"), _eight_bit, EightBitSettings, "bitsandbytes"
    ),
    "paged_adamw_8bit": OptimizerKind(
        "AdamW with 8-bit state, paged to the host's memory when the GPU's runs out",
        _bitsandbytes("PagedAdamW8bit"),
        _eight_bit,
        EightBitSettings,
        "bitsandbytes",
    ),
    "adafactor": OptimizerKind("Adafactor: factored second moment, no first", _adafactor, _factored, AdafactorSettings),
    "muon": OptimizerKind("Muon on hidden matrices, AdamW on the rest", MuonWithAdamW, _muon_state, MuonSettings),
    "lion": OptimizerKind("Lion: the sign of a momentum", _lion, _momentum, LionSettings, "bitsandbytes"),
    "sgd": OptimizerKind("gradient descent with momentum", _sgd, _momentum, SgdSettings),
}
