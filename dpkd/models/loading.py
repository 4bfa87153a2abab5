"""Models, tokenizers and configurations from a hub id, a folder of safetensors, or a .gguf file."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from dpkd.errors import DpkdError
from dpkd.models.settings import ModelSettings

__all__ = ["config_of", "count_parameters", "load_model", "load_tokenizer", "quiet_transformers"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars or advice that a user cannot act on, for the time of the block; errors stay."""
    from transformers.utils import logging as transformers_logging

    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def load_model(settings: ModelSettings, *, device: torch.device | str, dtype: torch.dtype | None) -> Any:
    """A causal LM in eval mode on a device.

    `settings.dtype` decides the type of the weights; where it is `auto`, `dtype` does, and None means as stored.
    Raises DpkdError when there is no such model, or when its weights are not safetensors.
    """
    from transformers import AutoModelForCausalLM

    wanted = _DTYPES.get(settings.dtype, dtype)
    options: dict[str, Any] = {"dtype": wanted or "auto", **_location(settings)}
    if settings.attention != "auto":
        options["attn_implementation"] = settings.attention
    with quiet_transformers(), _explained(settings):
        if _is_gguf(settings.model):
            model = _without_quantisation(AutoModelForCausalLM.from_pretrained(**options))
        else:
            _refuse_pickles(settings.model)
            model = AutoModelForCausalLM.from_pretrained(use_safetensors=True, **options)
    return model.to(device).eval()


def load_tokenizer(settings: ModelSettings) -> Any:
    """The tokenizer of a model; a missing pad token is EOS (a token is masked by its place, never by its id).

    Raises DpkdError when there is none, or when it has no EOS.
    """
    from transformers import AutoTokenizer

    named = getattr(settings, "tokenizer", None)
    source = ModelSettings(model=named, trust_remote_code=settings.trust_remote_code) if named else settings
    with quiet_transformers(), _explained(source):
        tokenizer = AutoTokenizer.from_pretrained(**_location(source))
    if tokenizer.eos_token_id is None:
        raise DpkdError(
            f"the tokenizer of {source.model} has no EOS token: a response could never end. "
            "Add `eos_token` to its tokenizer_config.json."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def config_of(settings: ModelSettings) -> Any:
    """The configuration alone: no weights are read."""
    from transformers import AutoConfig

    with quiet_transformers(), _explained(settings):
        return AutoConfig.from_pretrained(**_location(settings))


def count_parameters(config: Any) -> int:
    """Parameters of the model that a configuration describes, tied ones once."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"), quiet_transformers():
        model = AutoModelForCausalLM.from_config(config)
    return sum(p.numel() for p in model.parameters())


def _is_gguf(name: str | None) -> bool:
    return name is not None and name.endswith(".gguf")


def _location(settings: ModelSettings) -> dict[str, Any]:
    """Arguments that say where a model is."""
    assert settings.model is not None  # settings without a model are refused before
    path = Path(settings.model)
    if _is_gguf(settings.model):
        if not path.is_file():
            raise DpkdError(f"{settings.model} does not exist; expected a .gguf file")
        return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    options: dict[str, Any] = {"pretrained_model_name_or_path": settings.model}
    if settings.revision:
        options["revision"] = settings.revision
    if settings.trust_remote_code:
        options["trust_remote_code"] = True
    return options


def _refuse_pickles(name: str | None) -> None:
    """A folder whose weights are pickles is refused: loading them would run whatever is inside."""
    folder = Path(name or "")
    if not folder.is_dir() or any(folder.glob("*.safetensors")):
        return
    pickles = sorted(p.name for p in [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])
    if pickles:
        raise DpkdError(
            f"{name} has {pickles[0]} but no safetensors; dpkd reads no pickles. Convert it once, where you trust it: "
            f"AutoModelForCausalLM.from_pretrained({name!r}, use_safetensors=False).save_pretrained({name!r})"
        )
    raise DpkdError(f"{name} has no model weights: expected model.safetensors beside config.json")


@contextmanager
def _explained(settings: ModelSettings) -> Iterator[None]:
    """Turn what loading throws into a sentence."""
    try:
        yield
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise DpkdError(_why(settings, error)) from error


def _why(settings: ModelSettings, error: Exception) -> str:
    name = settings.model or ""
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    folder = Path(name)
    if folder.is_dir():
        return f"{name} cannot be loaded as a causal language model: {first}"
    near = difflib.get_close_matches(folder.name, [p.name for p in _siblings(folder)], n=1)
    hint = f" Did you mean the folder {folder.parent / near[0]}?" if near else ""
    if "trust_remote_code" in str(error):
        return (
            f"{name} brings its own Python code, which is off by default. Set trust_remote_code=true if you trust it."
        )
    return (
        f"{name} is neither a folder here nor a model that the hub gives ({first}).{hint} "
        "Name a hub id, or a folder with config.json and model.safetensors; without a network, `dpkd demo` needs no hub."
    )


def _siblings(folder: Path) -> list[Path]:
    return [p for p in folder.parent.iterdir() if p.is_dir()] if folder.parent.is_dir() else []


def _without_quantisation(model: Any) -> Any:
    """A model read from .gguf refuses to be saved; a fresh one with its weights does not."""
    from copy import deepcopy

    from transformers import AutoModelForCausalLM

    config = deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    fresh = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    fresh.load_state_dict(model.state_dict())
    fresh.generation_config = model.generation_config
    return fresh
