"""Models, tokenizers and configurations from a hub id, a folder of safetensors, or a .gguf file."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from copy import deepcopy
from typing import Any

import torch
from torch import nn

from dpkd.errors import DpkdError, described
from dpkd.models.device import out_of_memory
from dpkd.models.fused_layers import fuse_layers
from dpkd.models.head import causal_lm
from dpkd.models.locate import explained, is_gguf, location, refuse_pickles
from dpkd.models.quantization import (
    check_gradient,
    check_quantization,
    explained_packing,
    keep_layout,
    quantization_of,
    quantization_options,
    quiet_bitsandbytes,
)
from dpkd.models.quick_gguf import quick_gguf
from dpkd.models.settings import ModelSettings, StudentSettings

# Of the settings; `auto` is left out.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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
    Raises DpkdError when there is no such model, when its weights are not safetensors (or .gguf), or when they are
    not the weights that its configuration describes.
    """
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"dtype": DTYPES.get(settings.dtype, dtype) or "auto", **location(settings)}
    if settings.attention != "auto":
        options["attn_implementation"] = settings.attention
    packed = quantization_of(settings)
    if packed is not None:
        check_quantization(settings)
        options |= quantization_options(packed, device, DTYPES.get(settings.dtype, dtype))
    if options.get("local_files_only"):
        options["adapter_kwargs"] = {"local_files_only": True}
    # Mismatches are collected here and refused below: transformers' own words for them do not name the file.
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    quiet = quiet_bitsandbytes() if packed is not None else nullcontext()
    with quiet_transformers(), explained(settings, "model"), quiet, explained_packing(settings, device):
        if is_gguf(settings.model):
            # Its progress bar heeds no switch; errors are exceptions and do not pass through stderr.
            with redirect_stderr(io.StringIO()), quick_gguf(settings.model):
                loaded: Any = AutoModelForCausalLM.from_pretrained(**options)
            model, report = _without_quantisation(loaded[0]), loaded[1]
        else:
            refuse_pickles(str(settings.model))
            loaded = AutoModelForCausalLM.from_pretrained(use_safetensors=True, **options)
            model, report = loaded
        if packed is not None and isinstance(settings, StudentSettings):
            keep_layout(model)
            check_gradient(model)
        elif packed is not None:
            _try_out(model)
    _refuse_random_weights(settings.model, report)
    placed = (model if packed is not None else model.to(device)).eval()
    fuse_layers(placed)
    return placed


@torch.no_grad()
def _try_out(model: Any) -> None:
    """Run a packed model on two tokens: which sizes its kernels cannot compute shows here first."""
    model.eval()(input_ids=torch.zeros(1, 2, dtype=torch.long, device=model.device), use_cache=False)


def load_tokenizer(settings: ModelSettings) -> Any:
    """The tokenizer of a model; a missing pad token is EOS (a token is masked by its place, never by its id).

    Raises DpkdError when there is none, or when it has no EOS.
    """
    from transformers import AutoTokenizer

    named = getattr(settings, "tokenizer", None)
    source = ModelSettings(model=named, trust_remote_code=settings.trust_remote_code) if named else settings
    with quiet_transformers(), explained(source, "tokenizer"), quick_gguf(source.model):
        tokenizer = usable_tokenizer(AutoTokenizer.from_pretrained(**location(source)), str(source.model))
        tokenizer("x"), tokenizer.unk_token_id  # some mistakes in its files show at the first use only
    return tokenizer


def usable_tokenizer(tokenizer: Any, whose: str) -> Any:
    """The tokenizer, with EOS for a missing pad token.

    Raises DpkdError when it is empty, has no EOS, or a longest length that is no number.
    """
    if not isinstance(longest := tokenizer.model_max_length, int | float):
        raise DpkdError(
            f"the tokenizer of {whose}: expected a number of tokens as `model_max_length` in tokenizer_config.json, "
            f"found {str(longest)[:60]!r}. Correct it, or remove it: dpkd does not need it."
        )
    if not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):
        # From a GPT-2 or OPT folder without tokenizer files, transformers builds an empty one and says nothing.
        raise DpkdError(
            f"{whose} has no tokenizer: expected tokenizer.json, or vocab.json and merges.txt. "
            "Save it there with AutoTokenizer.from_pretrained(ITS_ORIGIN).save_pretrained(FOLDER)."
        )
    if tokenizer.eos_token_id is None:
        raise DpkdError(
            f"the tokenizer of {whose} has no EOS token: a response could never end. "
            "Add `eos_token` to its tokenizer_config.json."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def config_of(settings: ModelSettings) -> Any:
    """The configuration alone: no weights are read."""
    from transformers import AutoConfig

    with quiet_transformers(), explained(settings, "configuration"), quick_gguf(settings.model):
        config = AutoConfig.from_pretrained(**location(settings))
    if not isinstance(dtype := getattr(config, "dtype", None), torch.dtype | None):
        raise DpkdError(
            f"{settings.model}: expected a type such as bfloat16 as `dtype` in config.json, found {dtype!r}"
        )
    return config


def context_length(config: Any) -> int | None:
    """How many tokens a model reads at most, where its configuration says so."""
    length = getattr(config.get_text_config(), "max_position_embeddings", None)
    return int(length) if length else None


def longest_sequence(model: nn.Module) -> int | None:
    """How many tokens a model reads at most, where its configuration says so."""
    return context_length(causal_lm(model).config)


def new_model(config: Any, dtype: torch.dtype = torch.float32, *, blank: bool = False) -> Any:
    """A causal LM of a configuration, with random weights, or `blank`: with whatever memory held, to be overwritten.

    Raises DpkdError when the configuration is not one of a causal LM.
    """
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    # A configuration whose class is remote code was loaded with trust: its model may be made as well.
    trusted = type(config).__module__.startswith("transformers_modules")
    try:
        with quiet_transformers(), no_init_weights() if blank else nullcontext():
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trusted)
        if blank:
            model.tie_weights()  # a part of the initialization
        return model
    except Exception as error:  # sizes that nobody checks before: readers of configurations take any
        if isinstance(error, RuntimeError) and out_of_memory(error) is not None:
            raise
        what = f"{config.name_or_path}: " if config.name_or_path else ""
        raise DpkdError(
            f"{what}a configuration of type {config.model_type} makes no causal language model: {described(error, 200)}"
        ) from error


def count_parameters(config: Any) -> int:
    """Parameters of the model that a configuration describes, tied ones once; no memory is used."""
    with torch.device("meta"):
        model = new_model(deepcopy(config))
    return sum(p.numel() for p in model.parameters())


def _refuse_random_weights(name: str | None, report: dict[str, Any]) -> None:
    """Weights that a file lacks would be random without a word."""
    missing, mismatched = sorted(report["missing_keys"]), sorted(report["mismatched_keys"])
    if missing:
        raise DpkdError(
            f"{name} lacks {len(missing)} of the weights that its config.json describes, {missing[0]} for one; "
            "they would be random. Configuration and weights do not belong together."
        )
    if mismatched:
        key, stored, described = mismatched[0][:3]
        raise DpkdError(
            f"{name}: the weight {key} has the shape {tuple(stored)}, but config.json describes {tuple(described)}. "
            "Configuration and weights do not belong together."
        )


def _without_quantisation(model: Any) -> Any:
    """A model read from .gguf refuses to be saved; a fresh one with its weights does not."""
    config = deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    fresh = new_model(config, model.dtype, blank=True)
    fresh.load_state_dict(model.state_dict())
    fresh.generation_config = model.generation_config
    return fresh
