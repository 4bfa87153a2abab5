"""DeepSpeed's ZeRO (Rajbhandari et al., 1910.02054): optimizer, gradients and weights in parts, by stage 1, 2 and 3.

`accelerate launch --use_deepspeed` asks for it. The engine is driven from here and not by accelerate, which would
update inside the last backward pass of a step; what is asked for is read from accelerate's environment.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dpkd.config.settings import RunSettings
from dpkd.errors import DpkdError
from dpkd.models.device import device_of, precision_of
from dpkd.models.head import causal_lm
from dpkd.models.sharding import zero_config

if TYPE_CHECKING:
    from dpkd.train.loss_module import LossModule

# What a step of dpkd decides itself, and what accelerate gives DeepSpeed though nobody asked for it.
_DECIDED: dict[str, tuple[str, tuple[Any, ...]]] = {
    "train_batch_size": ("train.batch_size", ()),
    "train_micro_batch_size_per_gpu": ("train.micro_batch_size", ()),
    "gradient_accumulation_steps": ("train.micro_batch_size", (1,)),
    "gradient_clipping": ("train.clip", (1.0,)),
    "optimizer": ("train.optimizer", ()),
    "scheduler": ("train.schedule", ()),
    "fp16": ("train.precision", ()),
    "bf16": ("train.precision", ()),
    "steps_per_print": ("train.log_every", (float("inf"),)),
}
# A partition is a flat vector, in which an optimizer that looks at rows and columns of a weight finds none.
_BY_VALUE = ("adamw", "sgd")


class Zero:
    """A module in DeepSpeed's engine: its forward, backward and update."""

    def __init__(self, module: LossModule, optimizer: torch.optim.Optimizer, settings: RunSettings) -> None:
        import deepspeed

        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)  # its own calls
        _join_processes(settings)
        config = engine_config(settings)
        self.stage: int = config["zero_optimization"]["stage"]
        module.hooks_on_losses = False
        self.engine, self.optimizer, _, _ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
        if self.stage == 3:
            # Read outside of the forward of the module that owns them.
            head = causal_lm(module.student).get_output_embeddings()
            for parameter in (*head.parameters(), *module.losses.parameters()):
                deepspeed.zero.register_external_parameter(module, parameter)

    def backward(self, total: Tensor) -> None:
        """Add the gradient of a micro-batch to that of the step."""
        self.engine.backward(total, scale_wrt_gas=False)

    def step(self) -> Tensor:
        """Clip and update, and return the norm of the gradient; where that is not finite, no weight changes."""
        self.engine.step()
        norm = float("inf") if self.optimizer.overflow else self.engine.get_global_grad_norm()
        return torch.as_tensor(norm, dtype=torch.float32, device=self.engine.device).detach()

    def optimizer_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """The whole state of a parameter, from its share of the flat partitions; all processes call this together."""
        from deepspeed.utils import safe_get_full_optimizer_state

        self._link()
        partition: dict[str, Any] = self._state[self._partitions[0]]
        return {
            key: value if value.ndim == 0 else safe_get_full_optimizer_state(parameter, key)
            for key, value in partition.items()
            if torch.is_tensor(value)
        }

    def put_optimizer_state(self, states: Mapping[nn.Parameter, Mapping[str, Tensor]]) -> None:
        """The inverse of `optimizer_state`, for all parameters; all processes call this together."""
        from deepspeed.utils import safe_set_full_optimizer_state

        like = next(iter(states.values()), {})
        for flat in self._partitions:
            self._state[flat] = {k: torch.zeros_like(flat) if v.ndim else v.clone() for k, v in like.items()}
        self._link()
        for parameter, state in states.items():
            for key, value in state.items():
                if value.ndim:
                    safe_set_full_optimizer_state(parameter, value.to(parameter.device), key)

    @property
    def _state(self) -> Any:
        return self.optimizer.optimizer.state

    @property
    def _partitions(self) -> list[Tensor]:
        """The flat vectors that the optimizer updates in this process."""
        of_zero = self.optimizer
        return of_zero.fp32_partitioned_groups_flat if self.stage == 3 else of_zero.single_partition_of_fp32_groups  # type: ignore[no-any-return]

    def _link(self) -> None:
        """Tell parameters where their state is; DeepSpeed does that for those of the first group only."""
        from deepspeed.utils import lazy_init_hp_params_optimizer_state

        if self.stage < 3:
            for parameters, flat in zip(self.optimizer.bit16_groups, self._partitions, strict=True):
                lazy_init_hp_params_optimizer_state(parameters, flat, self._state)

    def close(self) -> None:
        """Give the engine's buffers and hooks back."""
        self.engine.destroy()


def check_zero(settings: RunSettings) -> None:
    """Raises DpkdError for what does not go together with ZeRO, all of it at once, and where DeepSpeed is absent."""
    given = zero_config()
    if given is None:
        return
    if settings.train.device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed  # noqa: F401
    except ImportError as error:
        why = f"accelerate was launched with DeepSpeed, which cannot be imported: {error}"
        raise DpkdError(f"{why}. pip install 'dpkd[deepspeed]'") from error
    train = settings.train
    offloads = [given["zero_optimization"].get(f"offload_{what}") or {} for what in ("optimizer", "param")]
    problems = [
        f"its configuration has {key}: {given[key]}; dpkd decides that by {ours}: leave it out, or give auto"
        for key, (ours, unasked) in _DECIDED.items()
        if given.get(key, "auto") not in ("auto", *unasked) and not _is_off(given[key])
    ]
    if train.optimizer not in _BY_VALUE:
        problems.append(f"train.optimizer={train.optimizer}; expected one of {', '.join(_BY_VALUE)}")
    if any(offload.get("device") == "nvme" for offload in offloads):
        problems.append("offloading to nvme: a checkpoint would not find what is there; offload to cpu")
    if train.ema is not None:
        problems.append("train.ema: the average would lie in the optimizer's flat partitions")
    if train.compile == "on":
        problems.append("train.compile=on: its hooks do not go into compiled layers")
    if settings.batch.probe:
        problems.append("batch.probe: the gradients of a probe cannot be thrown away")
    if problems:
        raise DpkdError(
            "DeepSpeed's ZeRO cannot do with:\n" + "\n".join(f"  {line}" for line in problems) + "\n"
            "Change that, or shard with FSDP 2: accelerate launch --use_fsdp --fsdp_version 2 ..."
        )


def _is_off(value: Any) -> bool:
    return isinstance(value, dict) and value.get("enabled", True) in (False, "auto")


def engine_config(settings: RunSettings) -> dict[str, Any]:
    """DeepSpeed's configuration: what was given to accelerate, but for what dpkd decides."""
    given = zero_config() or {}
    kept = {key: _without_auto(value) for key, value in given.items() if key not in _DECIDED and value != "auto"}
    if precision_of(settings.train.precision, device_of(settings.train.device)) == "bf16":
        kept["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    return {
        **kept,
        "train_micro_batch_size_per_gpu": 1,  # for its logs alone
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,  # every call of step() is the end of a step
        "gradient_clipping": settings.train.clip or 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**62,
    }


def _without_auto(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_auto(inner) for key, inner in value.items() if inner not in ("auto", None)}
    return value


def _join_processes(settings: RunSettings) -> None:
    """One process alone makes a group of itself, without a port: DeepSpeed wants a group."""
    distributed: Any = torch.distributed
    if not distributed.is_initialized():
        backend = "nccl" if torch.cuda.is_available() and settings.train.device != "cpu" else "gloo"
        distributed.init_process_group(backend, store=distributed.HashStore(), rank=0, world_size=1)


@contextmanager
def unseen_by_accelerate() -> Iterator[None]:
    """In the block accelerate is told nothing of DeepSpeed: to it the processes are those of plain data parallelism."""
    told = os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    try:
        yield
    finally:
        if told is not None:
            os.environ["ACCELERATE_USE_DEEPSPEED"] = told
