"""A frozen model with packed weights, through bitsandbytes: what to ask transformers for, and whether it can be had."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch

from dpkd.errors import DpkdError
from dpkd.models.settings import ModelSettings, TeacherSettings

BYTES = {"8bit": 1.0, "4bit": 0.5}


def quantization_of(settings: ModelSettings) -> str | None:
    """`8bit` or `4bit` where the settings ask for packed weights."""
    return None if settings.quantization == "none" else settings.quantization


def check_quantization(settings: ModelSettings) -> None:
    """Raises DpkdError when bitsandbytes is needed and not installed; nothing is imported."""
    wanted = quantization_of(settings)
    if wanted is not None and find_spec("bitsandbytes") is None:
        raise DpkdError(
            f"{_setting(settings)}={wanted} needs the package bitsandbytes: pip install 'dpkd[quant]'. "
            "On a machine without a GPU, leave it out unless memory demands it: packed weights are slow there"
        )


def keep_layout(model: Any) -> None:
    """Leave 4-bit weights as a backward pass reads them.

    On a CPU with AVX-512 in bf16 the first inference would repack them, and adapters would lose their gradient unsaid.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def check_gradient(model: Any) -> None:
    """Raises RuntimeError where no gradient passes through packed weights, after an inference as a run has it."""
    ids = torch.zeros(1, 2, dtype=torch.long, device=model.device)
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    with torch.no_grad():
        model.eval()(inputs_embeds=embedded, use_cache=False)
    logits = model.train()(inputs_embeds=embedded, use_cache=False).logits
    (grad,) = torch.autograd.grad(logits[0, -1, 0], [embedded])
    if not bool((grad[0, 0] != 0).any()):  # what reached the first token went through every layer
        raise RuntimeError("no gradient passes through packed weights")


@contextmanager
def explained_packing(settings: ModelSettings, device: torch.device | str) -> Iterator[None]:
    """What bitsandbytes cannot do on a device, as a DpkdError."""
    wanted = quantization_of(settings)
    try:
        yield
    except (RuntimeError, ValueError, ImportError, AttributeError, AssertionError) as error:
        if wanted is None:
            raise
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise DpkdError(
            f"{_setting(settings)}={wanted} does not work on this machine's {torch.device(device).type} with "
            f"bitsandbytes {version('bitsandbytes')} ({first}). Leave it out, or use a GPU"
        ) from error


def _setting(settings: ModelSettings) -> str:
    return f"{'teacher' if isinstance(settings, TeacherSettings) else 'student'}.quantization"


def quantization_options(wanted: str, device: torch.device | str, dtype: torch.dtype | None) -> dict[str, Any]:
    """Arguments of `from_pretrained` for a quantization. `dtype` is that of the computation; None: float32.

    8bit is LLM.int8 (arXiv:2208.07339), 4bit is NF4 (arXiv:2305.14314, section 3). Embeddings, norms and the output
    head stay as they are. Packed weights are put on their device while they are read: they cannot move afterwards.
    """
    from transformers import BitsAndBytesConfig

    packed = (
        BitsAndBytesConfig(load_in_8bit=True)
        if wanted == "8bit"
        else BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype or torch.float32
        )
    )
    return {"quantization_config": packed, "device_map": {"": torch.device(device)}}


@contextmanager
def quiet_bitsandbytes() -> Iterator[None]:
    """Without the word that each layer would say about its types, and what its imports say about torch."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`torch.jit.script_method` is deprecated")
        yield


def weight_bytes(config: Any, parameters: int, itemsize: int, wanted: str | None) -> float:
    """Bytes of a model's weights: embeddings and output head keep `itemsize`, all else is packed where it is wanted."""
    if wanted is None:
        return float(itemsize * parameters)
    text = config.get_text_config()
    matrices = 1 if text.tie_word_embeddings else 2
    whole = min(parameters, int(matrices * text.vocab_size * text.hidden_size))
    return itemsize * whole + BYTES[wanted] * (parameters - whole)
