"""What a device can do, and what a run makes of it: where it trains, and in which precision."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch

from dpkd.errors import DpkdError

Precision = Literal["fp32", "bf16"]


def device_of(name: str) -> torch.device:
    """The device of a setting; `auto` is the first GPU, then Apple's, then the CPU.

    Raises DpkdError for a GPU that is not there.
    """
    there: dict[str, Callable[[], bool]] = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}
    if name in there and not there[name]():
        raise DpkdError(
            f"train.device: {name} is asked for, and PyTorch {torch.__version__} finds no such device on this machine. "
            "Leave it at auto, or check the driver and the build: "
            f"python -c 'import torch; print(torch.{'' if name == 'cuda' else 'backends.'}{name}.is_available())'"
        )
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


def attend_without_plans() -> None:
    """Take no attention kernel of cuDNN, which PyTorch prefers on Hopper and later; nothing changes off a GPU.

    It plans each shape of a batch anew on the host, and batches of text hardly ever have the same.
    """
    if torch.cuda.is_available():
        torch.backends.cuda.enable_cudnn_sdp(False)


def memory_of(device: torch.device) -> int | None:
    """Bytes of memory that a device has, within the limit of the container; None where it does not say."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    if device.type != "cpu":
        return None
    import psutil

    limit = Path("/sys/fs/cgroup/memory.max")
    allowed = limit.read_text(encoding="ascii").strip() if limit.is_file() else "max"
    total = int(psutil.virtual_memory().total)
    return total if allowed == "max" else min(total, int(allowed))


def precision_sentence(device: torch.device, mixed_precision: str) -> str:
    """The line at the start of a run."""
    memory = memory_of(device)
    gpu = device.type == "cuda"
    what = "bf16 autocast" if mixed_precision == "bf16" else "fp32"
    name = torch.cuda.get_device_name(device) if gpu else device.type
    rest = ", TF32 for what stays fp32" if gpu else ""
    size = "" if memory is None else f", {memory / 2**30:.1f} GiB of memory"
    return f"device: {name}{size}, {what}{rest} (train.device, train.precision)"


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
