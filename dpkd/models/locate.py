"""Where a model is, as arguments for transformers, and sentences for what goes wrong in reading it."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dpkd.data.hub import out_of_reach
from dpkd.data.memory import refuse_memory
from dpkd.data.sources import HUB_ID
from dpkd.errors import DpkdError
from dpkd.io import parsed
from dpkd.models.settings import ModelSettings

_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_BOUNDS = {**dict.fromkeys(_LAYERS, (1, 10_000)), "sliding_window": (-1, 2**31)}  # of numbers in config.json
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def is_gguf(name: str | None) -> bool:
    """Whether a name is that of a .gguf file."""
    return name is not None and name.lower().endswith(".gguf")


def is_cached(name: str) -> bool:
    """Whether a name is that of a model of the hub which was loaded before."""
    from huggingface_hub import try_to_load_from_cache

    return HUB_ID.fullmatch(name) is not None and isinstance(try_to_load_from_cache(name, "config.json"), str)


def location(settings: ModelSettings) -> dict[str, Any]:
    """Arguments of every `from_pretrained` that say where a model is.

    Remote code is refused in words: left unsaid, transformers asks on the terminal. Raises DpkdError when a name is
    a path to nothing, or to a configuration with impossible numbers.
    """
    assert settings.model is not None  # settings without a model are refused before
    name, path = settings.model, Path(settings.model)
    refuse_memory(name, "model")
    options: dict[str, Any] = {"trust_remote_code": settings.trust_remote_code}
    if is_gguf(name):
        if not path.is_file():
            raise DpkdError(f"{name} does not exist; expected a .gguf file.{nearest(path, '*.gguf')}")
        return {**options, "pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    options["pretrained_model_name_or_path"] = name
    if settings.revision:
        options["revision"] = settings.revision
    if path.is_file():
        raise DpkdError(f"{name} is a file; expected the folder that holds it beside config.json, or a .gguf file")
    if not path.is_dir():
        if _is_path(name):
            raise DpkdError(f"the folder {name} does not exist.{nearest(path)} {_EXPECTED}")
        if out_of_reach():
            options["local_files_only"] = True  # the hub's client would retry for half a minute
    _check_numbers(path / "config.json")
    return options


def _check_numbers(file: Path) -> None:
    """What transformers takes as it is: it makes as many layers as a configuration says, for as long as that takes."""
    config = (parsed(file.read_bytes()) if file.is_file() else None) or {}
    for key, (least, most) in _BOUNDS.items():
        number = config.get(key)
        if number is not None and not (isinstance(number, int) and least <= number <= most):
            raise DpkdError(
                f"{file}: {key}: expected an integer from {least:,} to {most:,}, found {str(number)[:60]!r}. "
                "Restore the file from where the model came from."
            )


def refuse_pickles(name: str) -> None:
    """A folder whose weights are pickles is refused: loading them would run whatever is inside."""
    folder = Path(name)
    if not folder.is_dir() or any(folder.glob("*.safetensors")):
        return
    pickles = sorted(p.name for pattern in _PICKLES for p in folder.glob(pattern))
    if pickles:
        raise DpkdError(
            f"{name} has {pickles[0]} but no safetensors; dpkd reads no pickles. Convert it once, where you trust it: "
            f"AutoModelForCausalLM.from_pretrained({name!r}, use_safetensors=False).save_pretrained({name!r})"
        )
    raise DpkdError(f"{name} has no model weights: expected model.safetensors beside config.json")


@contextmanager
def explained(settings: ModelSettings, what: str) -> Iterator[None]:
    """Turn whatever loading `what` throws into a sentence: readers of files raise errors of every kind."""
    try:
        yield
    except DpkdError:
        raise
    except Exception as error:
        raise DpkdError(_why(settings, what, error)) from error


_EXPECTED = (
    "Name a hub id, or a folder with config.json and model.safetensors (that of a run: RUN/model); `dpkd demo` needs "
    "no hub."
)


def _why(settings: ModelSettings, what: str, error: Exception) -> str:
    name, text = settings.model or "", str(error).strip()
    first = text.splitlines()[0] if text else "no reason given"
    if not isinstance(error, OSError | ValueError | ImportError):
        first = f"{type(error).__name__}: {first}"
    if "trust_remote_code" in text:
        return (
            f"{name} contains Python code, which is not run by default. Pass --trust-remote-code if you trust it."
            " (In settings: teacher.trust_remote_code, student.trust_remote_code.)"
        )
    if is_gguf(name):
        packages = " Reading .gguf needs gguf and sentencepiece: pip install 'dpkd[demo]'."
        return f"the {what} of {name} cannot be read: {first}.{packages if isinstance(error, ImportError) else ''}"
    if Path(name).is_dir():
        return f"the {what} of {name} cannot be loaded: {first}"
    if "safetensors" in text:
        return (
            f"{name} on the hub has no safetensors ({first}); dpkd reads no pickles. "
            "Convert it once, where you trust it, and name the folder: "
            f"AutoModelForCausalLM.from_pretrained({name!r}).save_pretrained('FOLDER')"
        )
    found = f"{name} is not a local folder, and the hub did not provide its {what}"
    own = Path("runs", name, "model")
    near = f" Did you mean {own}?" if own.is_dir() else nearest(Path(name))
    return f"{found}: {first}{near} {_EXPECTED}"


def _is_path(name: str) -> bool:
    """Whether a name can only be a path: a hub id has at most one slash and starts with a letter or digit."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name or os.path.isabs(name)


def nearest(path: Path, pattern: str = "*/") -> str:
    """The question whether another name in the same folder was meant, or nothing."""
    names = {p.name.lower(): p.name for p in path.parent.glob(pattern)} if path.parent.is_dir() else {}
    near = difflib.get_close_matches(path.name.lower(), list(names), n=1)
    return f" Did you mean {path.parent / names[near[0]]}?" if near else ""
