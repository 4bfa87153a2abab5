"""Where a student comes from: a checkpoint, some layers of its teacher, or fresh weights."""

from __future__ import annotations

import warnings
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import nn

from dpkd.errors import DpkdError
from dpkd.models.fused_layers import fuse_layers
from dpkd.models.in_memory import InMemory
from dpkd.models.loading import DTYPES, new_model
from dpkd.models.settings import StudentSettings

FAMILIES = "Llama, GPT-2, OPT, Qwen2"


def even_layers(count: int, of: int) -> list[int]:
    """`count` of the layers 0 … of-1: the first, the last, and evenly between.

    >>> even_layers(4, 12)
    [0, 4, 7, 11]
    """
    if count == 1:
        return [0]
    return [round(i * (of - 1) / (count - 1)) for i in range(count)]


def make_student(
    settings: StudentSettings,
    *,
    teacher: Any | None,
    device: torch.device | str,
    seed: int,
    in_memory: InMemory | None = None,
) -> Any:
    """The student, with trainable float32 weights unless the settings name another type.

    A student that is in memory is copied.
    Raises DpkdError when layers are out of range or the model's layers are not one list.
    """
    in_memory = in_memory or InMemory()
    if settings.init == "pretrained":
        student = in_memory.load_copy(settings, device=device, dtype=torch.float32)
    else:
        config = student_config(settings, None if teacher is None else teacher.config, in_memory)
        layers = settings.init == "layers"  # all weights are the teacher's
        student = _fresh(config, seed, DTYPES.get(settings.dtype, torch.float32), blank=layers)
        if layers and teacher is not None:
            _copy_weights(teacher, student, _kept(settings, teacher.config))
            student.generation_config = deepcopy(teacher.generation_config)
        student = student.to(device)
        fuse_layers(student)
    if settings.dropout == "off":
        switch_dropout_off(student)
    return student


def student_config(settings: StudentSettings, teacher_config: Any, in_memory: InMemory | None = None) -> Any:
    """The student's configuration, without its weights.

    Raises DpkdError when it follows a teacher that is not named, or when layers are out of range.
    """
    if settings.init == "pretrained" or (settings.init == "random" and settings.model is not None):
        config = (in_memory or InMemory()).config(settings)
    elif teacher_config is not None:
        config = deepcopy(teacher_config)
        if hasattr(config, "quantization_config"):  # of a teacher that was read with packed weights
            del config.quantization_config
    else:
        raise DpkdError(f"student.init `{settings.init}` follows the teacher's shape: name a teacher with --teacher")
    if settings.layers is not None:
        _cut_layers(config, _kept(settings, config))
    return config


def _kept(settings: StudentSettings, config: Any) -> list[int]:
    """Indices of the layers that the student keeps."""
    total = config.get_text_config().num_hidden_layers
    whose = "student.model" if settings.model is not None else "the teacher"
    if isinstance(settings.layers, int):
        if settings.layers > total:
            raise DpkdError(f"student.layers: {settings.layers} layers asked for, but {whose} has {total}")
        return even_layers(settings.layers, total)
    layers = settings.layers or list(range(total))
    outside = [i for i in layers if not 0 <= i < total]
    if outside:
        raise DpkdError(f"student.layers: {outside} do not exist; the layers of {whose} are 0 to {total - 1}")
    return layers


def _cut_layers(config: Any, kept: list[int]) -> None:
    """Leave a configuration fewer layers, and its lists of per-layer facts cut to match."""
    text = config.get_text_config()
    total = text.num_hidden_layers
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == total and name.endswith(("layer_types", "_layers", "layers")):
            setattr(text, name, [value[i] for i in kept])
    text.num_hidden_layers = len(kept)


def _fresh(config: Any, seed: int, dtype: torch.dtype, *, blank: bool) -> Any:
    """A model of a configuration with seeded weights, or none that count; other random numbers are left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # Made in its type, not cast to it: a cast would also round the rotary frequencies, which stay float32.
        return new_model(config, dtype, blank=blank)


def _layer_prefix(model: nn.Module) -> str:
    """Name of the one list of decoder layers."""
    total = model.config.get_text_config().num_hidden_layers  # type: ignore[union-attr, operator]
    lists = [n for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == total]
    outer = [n for n in lists if not any(n != other and n.startswith(f"{other}.") for other in lists)]
    if len(outer) != 1:
        raise DpkdError(
            f"student.init `layers` found {len(outer)} lists of {total} layers in {type(model).__name__}; "
            f"it knows models with exactly one, such as those of the families {FAMILIES}"
        )
    return f"{outer[0]}."


@torch.no_grad()
def _copy_weights(teacher: nn.Module, student: nn.Module, kept: list[int]) -> None:
    """Copy embeddings, norms, head and the kept layers into the student's own storage."""
    prefix = _layer_prefix(teacher)
    place = {old: new for new, old in enumerate(kept)}
    taken = {}
    for name, value in teacher.state_dict().items():
        if name.startswith(prefix):
            number, rest = name.removeprefix(prefix).split(".", 1)
            if int(number) not in place:
                continue
            name = f"{prefix}{place[int(number)]}.{rest}"
        taken[name] = value
    try:
        student.load_state_dict(taken)
    except RuntimeError as error:
        raise DpkdError(
            f"student.init `layers`: the layers of {type(teacher).__name__} differ, and layers {kept} do not "
            f"make a model ({str(error).splitlines()[-1].strip()}). Known families are {FAMILIES}."
        ) from error


# What selective recomputation keeps: the results of matrix products and attention, which cost the most to make again.
_KEPT = (
    *("mm", "addmm", "bmm", "_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention"),
    *("_scaled_dot_product_cudnn_attention", "_scaled_dot_product_flash_attention_for_cpu", "_flash_attention_forward"),
)


def recompute_activations(student: Any, *, selective: bool) -> None:
    """Have the layers compute their activations again in backward: all, or (selective) all but the dearest to make."""
    how: dict[str, Any] = {"use_reentrant": False}
    if selective:
        from torch.utils.checkpoint import create_selective_checkpoint_contexts

        kept = [getattr(torch.ops.aten, name).default for name in _KEPT if hasattr(torch.ops.aten, name)]
        how["context_fn"] = partial(create_selective_checkpoint_contexts, kept)
    with warnings.catch_warnings():
        # transformers has renamed it: where both names are there, the older one warns.
        warnings.filterwarnings("ignore", message="`gradient_checkpointing_enable` is deprecated")
        student.gradient_checkpointing_enable(how)
    student.enable_input_require_grads()  # frozen embeddings (LoRA) would cut the graph


def switch_dropout_off(model: nn.Module) -> None:
    """All dropout probabilities to 0, in modules and in the attributes that attention code reads."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and ("dropout" in name or name == "layerdrop"):
                setattr(module, name, 0.0)
