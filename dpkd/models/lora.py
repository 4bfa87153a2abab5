"""Low-rank adapters on a student, through peft."""

from __future__ import annotations

import warnings
from copy import deepcopy
from typing import Any

from dpkd.errors import DpkdError
from dpkd.models.quantization import quiet_bitsandbytes
from dpkd.models.settings import LoraSettings


def add_lora(model: Any, settings: LoraSettings) -> Any:
    """The model with trainable adapters and everything else frozen; the output head gets none.

    Raises DpkdError when peft is not installed, when no module has one of the names, or when one is the head.
    """
    try:
        with quiet_bitsandbytes():  # peft imports it where it is installed
            from peft import LoraConfig
    except ImportError as error:
        raise DpkdError("student.lora needs the package peft: pip install 'dpkd[peft]'") from error
    if settings.targets != "all-linear":
        _check_targets(model, settings.targets)
    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        bias="none",
        target_modules=settings.targets,
        task_type="CAUSAL_LM",
    )
    return _with_adapters(model, config)


def _with_adapters(model: Any, config: Any) -> Any:
    from peft import get_peft_model

    with warnings.catch_warnings():
        # GPT-2's Conv1D is noticed and handled by peft; a property that it reads is being renamed in transformers.
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        return get_peft_model(model, config)


def merged(model: Any) -> Any:
    """A plain causal LM with the adapters added into the weights; the model itself stays as it is.

    Packed weights are unpacked first: packed again after the sum they would not be what was trained.
    """
    copy = deepcopy(model)
    if getattr(copy.get_base_model(), "quantization_method", None) is None:
        return copy.merge_and_unload()
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    base = copy.unload().dequantize()
    if hasattr(base.config, "quantization_config"):
        del base.config.quantization_config
    plain = _with_adapters(base, model.peft_config["default"])
    set_peft_model_state_dict(plain, get_peft_model_state_dict(model))
    return plain.merge_and_unload()


def _check_targets(model: Any, targets: list[str]) -> None:
    """Every name must be of a module that can be adapted, and none of the head, nor of embeddings tied to it."""
    matrices = {
        name: module
        for name, module in model.named_modules()
        if getattr(getattr(module, "weight", None), "ndim", 0) == 2
    }
    head = model.get_output_embeddings().weight
    for target in targets:
        found = [module for name, module in matrices.items() if f".{name}".endswith(f".{target}")]
        if not found:
            names = ", ".join(sorted({name.rsplit(".", 1)[-1] for name, m in matrices.items() if m.weight is not head}))
            raise DpkdError(
                f"student.lora.targets: {target!r} names no module of {type(model).__name__}; it has {names}"
            )
        if any(module.weight is head for module in found):
            raise DpkdError(
                f"student.lora.targets: {target!r} is the output head of {type(model).__name__}, or tied to it. "
                "The head is always left frozen: leave this name out"
            )
