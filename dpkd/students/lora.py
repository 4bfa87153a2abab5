"""Low-rank adapters on a student, through peft."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from dpkd.errors import DpkdError
from dpkd.models.settings import LoraSettings

__all__ = ["add_lora", "merged"]


def add_lora(model: Any, settings: LoraSettings) -> Any:
    """The model with trainable adapters and everything else frozen; the output head gets none.

    Raises DpkdError when peft is not installed, or when no module has one of the names.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise DpkdError("student.lora needs the package peft: pip install 'dpkd[peft]'") from error
    config = LoraConfig(
        r=settings.r, lora_alpha=settings.alpha, lora_dropout=settings.dropout, bias="none",
        target_modules=settings.targets, task_type="CAUSAL_LM",
    )  # fmt: skip
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        leaves = sorted(
            {
                name.rsplit(".", 1)[-1]
                for name, m in model.named_modules()
                if hasattr(m, "weight") and m.weight is not None and m.weight.ndim == 2
            }
        )
        raise DpkdError(
            f"student.lora.targets: {settings.targets} names no module of {type(model).__name__}; it has {', '.join(leaves)}"
        ) from error


def merged(model: Any) -> Any:
    """A plain causal LM with the adapters added into the weights; the model itself stays as it is."""
    return deepcopy(model).merge_and_unload()
