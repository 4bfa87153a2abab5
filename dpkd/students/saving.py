"""Saving a student so that transformers loads it, whole or not at all."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from dpkd.models.head import causal_lm
from dpkd.models.loading import quiet_transformers
from dpkd.students.lora import merged

__all__ = ["save_model"]


def save_model(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write weights (safetensors), configuration and tokenizer; adapters are merged, and also saved as `../adapter`.

    The folder appears complete, by a rename; an older one is replaced.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    with quiet_transformers():
        if hasattr(model, "peft_config"):
            model.save_pretrained(folder.with_name("adapter"), safe_serialization=True)
            plain = merged(model)
        else:
            plain = causal_lm(model)
        plain.save_pretrained(temporary, safe_serialization=True)
        tokenizer.save_pretrained(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
