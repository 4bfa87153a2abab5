"""What a device can do, and what a run makes of it: where it trains, and in which precision."""

from __future__ import annotations

from typing import Literal

import torch

Precision = Literal["fp32", "bf16"]


def device_of(name: str) -> torch.device:
    """The device of a setting; `auto` is the first GPU, then Apple's, then the CPU."""
    if name != "auto":
        return torch.device(name)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def precision_of(setting: Literal["auto", "fp32", "bf16"], device: torch.device) -> Precision:
    """What `auto` stands for on a device: bf16 on a GPU that computes in it, else fp32."""
    if setting != "auto":
        return setting
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"


def allow_tf32() -> None:
    """Let products that stay in float32 use the GPU's TensorFloat-32; nothing changes elsewhere."""
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")


def precision_sentence(device: torch.device, mixed_precision: str) -> str:
    """The line at the start of a run."""
    gpu = device.type == "cuda"
    what = "bf16 autocast" if mixed_precision == "bf16" else "fp32"
    name = torch.cuda.get_device_name(device) if gpu else device.type
    rest = ", TF32 for what stays fp32" if gpu else ""
    return f"device: {name}, {what}{rest} (train.precision)"


def teacher_dtype(setting: Literal["auto", "fp32", "bf16"], device: torch.device) -> torch.dtype | None:
    """Type of the teacher's weights where its settings leave it open: bf16 beside a bf16 run on a GPU, else as stored.

    In float32 they cost twice the memory and many times the time, and nothing trains them.
    """
    return torch.bfloat16 if device.type == "cuda" and precision_of(setting, device) == "bf16" else None


def out_of_memory(error: RuntimeError) -> str | None:
    """What to say when an error means that memory ran out, on a GPU or a CPU; None for any other."""
    if not isinstance(error, torch.OutOfMemoryError) and "not enough memory" not in str(error):
        return None
    return (
        "the memory of the device is too small for this run. Lower train.micro_batch_size, or set batch.tokens: "
        "neither changes a result. Less is needed too with student.gradient_checkpointing=true, train.precision=bf16 "
        "and student.lora, and for sampling with a lower text.sampling.batch_size."
    )
