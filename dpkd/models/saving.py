"""Saving a student so that transformers loads it, whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dpkd.models.head import causal_lm
from dpkd.models.loading import new_model, quiet_transformers
from dpkd.models.lora import merged
from dpkd.models.sharding import is_sharded


def save_model(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write weights (safetensors), configuration and tokenizer; adapters are merged, and also saved as `../adapter`.

    Each folder appears complete, by a rename; an older one is replaced.
    """
    if is_sharded(model):
        model = _unsharded(model)
    with quiet_transformers():
        if hasattr(model, "peft_config"):
            with _whole(folder.with_name("adapter")) as unfinished:
                model.save_pretrained(unfinished, save_embedding_layers=False)
            plain = merged(model)
        else:
            plain = causal_lm(model)
        with _whole(folder) as unfinished:
            plain.save_pretrained(unfinished)
            tokenizer.save_pretrained(unfinished)


def _unsharded(model: Any) -> Any:
    """A copy on the CPU of a model that FSDP has sharded, and gathered: it cannot be copied or saved itself."""
    copy = new_model(causal_lm(model).config)
    if hasattr(model, "peft_config"):
        from peft import get_peft_model

        copy = get_peft_model(copy, model.peft_config["default"])
    live = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in copy.named_parameters():
        parameter.data.copy_(live[name].detach())
    return copy


@contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """A folder to write into that takes the place of `folder` at the end of the block, and only if all went well."""
    unfinished, old = (folder.with_name(f".{folder.name}.{suffix}") for suffix in ("tmp", "old"))
    for leftover in (unfinished, old):
        shutil.rmtree(leftover, ignore_errors=True)
    unfinished.mkdir(parents=True)
    yield unfinished
    if folder.exists():
        folder.rename(old)
    unfinished.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
