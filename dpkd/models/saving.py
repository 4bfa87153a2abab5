"""Saving a student so that transformers loads it, whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dpkd.io import whole_folder
from dpkd.models.head import causal_lm
from dpkd.models.loading import new_model, quiet_transformers
from dpkd.models.lora import merged
from dpkd.models.sharding import is_sharded


def save_model(model: Any, tokenizer: Any, folder: Path, adapter: Path | None = None) -> None:
    """Write weights (safetensors), configuration and tokenizer; adapters are merged, and also saved by themselves.

    `adapter` None: as `../adapter`. Each folder appears complete, by a rename; an older one is replaced.
    """
    if is_sharded(model):
        model = whole_copy(model)
    with quiet_transformers():
        if hasattr(model, "peft_config"):
            with whole_folder(adapter or folder.with_name("adapter")) as unfinished:
                model.save_pretrained(unfinished, save_embedding_layers=False)
            plain = merged(model)
        else:
            plain = causal_lm(model)
        with whole_folder(folder) as unfinished:
            plain.save_pretrained(unfinished)
            tokenizer.save_pretrained(unfinished)


def whole_copy(model: Any) -> Any:
    """A copy on the CPU of a model that is sharded, and gathered: it cannot be copied or saved itself."""
    copy = new_model(causal_lm(model).config, blank=True)
    if hasattr(model, "peft_config"):
        from peft import get_peft_model

        copy = get_peft_model(copy, model.peft_config["default"])
    live = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in copy.named_parameters():
        parameter.data.copy_(live[name].detach())
    return copy
