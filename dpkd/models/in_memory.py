"""Where the models and the rows of a run come from: objects in memory where they were given, else disk or hub.

Everything that loads a model asks `InMemory` first. An object has a name in the settings (`in-memory:teacher`), so that
files and messages read as they do for any other model.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import torch

from dpkd.data.memory import refuse_memory
from dpkd.errors import DpkdError
from dpkd.models.fingerprint import fingerprint_of, memory_fingerprint
from dpkd.models.fused_layers import fuse_layers, unfuse_layers
from dpkd.models.loading import DTYPES, config_of, load_model, load_tokenizer, usable_tokenizer
from dpkd.models.settings import ModelSettings

T = TypeVar("T")


@dataclass(frozen=True)
class InMemoryModel:
    """A model of transformers in memory, and its tokenizer (None: that of the model's `name_or_path`)."""

    model: Any
    tokenizer: Any | None = None

    @cached_property
    def fingerprint(self) -> str:
        """Of its configuration and of every byte of its weights, when it is first asked for."""
        return memory_fingerprint(self.model)


@dataclass(frozen=True)
class InMemory:
    """Objects in memory, by the names that the settings have for them; without any, everything comes from disk."""

    models: Mapping[str, InMemoryModel] = field(default_factory=dict)
    data: Mapping[str, Iterable[Any]] = field(default_factory=dict)
    runs_left: int = 1  # of this process, the present one included
    compiled: set[Hashable] = field(default_factory=set, repr=False)  # see `models.compile.code_of`

    def rows(self, path: str) -> Iterable[Any] | None:
        """The rows in memory of a name, None where the name is that of a file or of the hub."""
        return self.data.get(path)

    def config(self, settings: ModelSettings) -> Any:
        """The configuration alone, a copy."""
        one = self._model(settings)
        return deepcopy(one.model.config) if one is not None else config_of(settings)

    def tokenizer(self, settings: ModelSettings) -> Any:
        """The tokenizer: the one that the settings name, else the one given with the model, else the model's own.

        Raises DpkdError when there is none, or when it has no EOS.
        """
        one = self._model(settings)
        if one is None or getattr(settings, "tokenizer", None):
            return load_tokenizer(settings)
        if one.tokenizer is not None:
            return usable_tokenizer(deepcopy(one.tokenizer), str(settings.model))
        origin = getattr(one.model, "name_or_path", "")
        try:
            return load_tokenizer(ModelSettings(model=origin)) if origin else _no_tokenizer(settings, "it has none")
        except DpkdError as error:
            return _no_tokenizer(settings, str(error))

    def load(self, settings: ModelSettings, *, device: torch.device | str, dtype: torch.dtype | None) -> Any:
        """A causal LM in eval mode.

        One in memory is used as it is, not copied; it stays where it is, unless that is the CPU and `device` is not.
        """
        one = self._model(settings)
        if one is None:
            return load_model(settings, device=device, dtype=dtype)
        placed = _placed(one.model, getattr(settings, "device", None), device).eval()
        fuse_layers(placed)
        return placed

    def load_copy(self, settings: ModelSettings, *, device: torch.device | str, dtype: torch.dtype | None) -> Any:
        """As `load`, for a model that will be changed: one in memory is copied, and parameters take the type."""
        one = self._model(settings)
        if one is None:
            return load_model(settings, device=device, dtype=dtype)
        own = deepcopy(one.model)
        wanted = DTYPES.get(settings.dtype, dtype)
        for parameter in own.parameters() if wanted is not None else ():
            # Buffers keep their type: rotary frequencies are float32 in every model.
            parameter.data = parameter.data.to(wanted)
        fuse_layers(own.to(device).eval())
        return own

    def fingerprint(self, settings: ModelSettings) -> str:
        """Who the model is: a hash that changes when its weights do."""
        one = self._model(settings)
        if one is not None:
            return one.fingerprint
        refuse_memory(str(settings.model), "model")
        return fingerprint_of(settings)

    def remembered(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` gives; runs that share it (see `models.shared`) make it once for a key."""
        return make()

    def described(self) -> dict[str, str]:
        """For run.json: what kind of object each name stands for, and where a model says that it came from."""
        kinds = {name: type(rows).__name__ for name, rows in self.data.items()}
        for name, one in self.models.items():
            origin = getattr(one.model, "name_or_path", "")
            kinds[name] = type(one.model).__name__ + (f" ({origin})" if origin else "")
        return kinds

    @contextmanager
    def left_alone(self) -> Iterator[None]:
        """Modes, gradient flags and classes of the models are, after the block, as they were before it."""
        modules = [module for one in self.models.values() for module in one.model.modules()]
        parameters = [parameter for one in self.models.values() for parameter in one.model.parameters()]
        modes, flags = [m.training for m in modules], [p.requires_grad for p in parameters]
        try:
            yield
        finally:
            for module, mode in zip(modules, modes, strict=True):
                module.training = mode
            for parameter, flag in zip(parameters, flags, strict=True):
                parameter.requires_grad_(flag)
            for one in self.models.values():
                unfuse_layers(one.model)

    def _model(self, settings: ModelSettings) -> InMemoryModel | None:
        return self.models.get(settings.model or "")


def given_rows(data: Any) -> Iterable[Any]:
    """Rows that a caller passes. Raises DpkdError when it is no iterable of rows."""
    if isinstance(data, Mapping):
        what = "a DatasetDict" if hasattr(data, "column_names") else f"a {type(data).__name__}"
        raise DpkdError(f"data: expected rows, but got {what} of {', '.join(map(str, data))}: give one split of it")
    if isinstance(data, bytes) or not isinstance(data, Iterable):
        raise DpkdError(f"data: expected a name, a path, or an iterable of rows, but got {type(data).__name__}")
    return data


def given_model(what: str, model: Any, tokenizer: Any | None) -> InMemoryModel:
    """A model that a caller passes as the `what` of a run. Raises DpkdError when it cannot be that.

    Wrappers hide the model, and a copy of one that was prepared for training may still run the original.
    """
    from transformers import PreTrainedModel

    if hasattr(model, "peft_config"):
        raise DpkdError(
            f"{what}: a model with adapters was given; merge them first ({what}.merge_and_unload()). "
            "To train adapters: --set student.lora.r=16"
        )
    if not isinstance(model, PreTrainedModel) or model.get_output_embeddings() is None:
        raise DpkdError(
            f"{what}: expected a name, a path, or a causal language model of transformers (AutoModelForCausalLM), but "
            f"got {type(model).__name__}. To unwrap DDP, FSDP or torch.compile: accelerator.unwrap_model({what})"
        )
    if hasattr(model, "_original_forward"):
        raise DpkdError(f"{what}: was prepared by accelerate; give accelerator.unwrap_model({what}, False)")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise DpkdError(f"{what}: some of its weights are not loaded (they are on the device `meta`)")
    return InMemoryModel(model, tokenizer)


def _placed(model: Any, wanted: str | None, device: torch.device | str) -> Any:
    here = next(model.parameters()).device
    if wanted is not None:
        return model.to(wanted)
    return model.to(device) if here.type == "cpu" else model


def _no_tokenizer(settings: ModelSettings, why: str) -> Any:
    raise DpkdError(f"{settings.model}: has no tokenizer that could be found ({why}); pass one as tokenizer=")
