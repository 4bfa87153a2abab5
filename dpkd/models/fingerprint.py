"""Who a model is: a short hash that changes when its weights do, and does not depend on where they lie."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpkd.errors import DpkdError
from dpkd.models.quantization import quantization_of
from dpkd.models.settings import ModelSettings

SAMPLES, SAMPLE_BYTES = 64, 1024
# What a loader writes into a configuration: it says nothing about the model.
NOT_THE_MODEL = {"_name_or_path", "transformers_version", "_commit_hash", "dtype", "torch_dtype", "use_cache"}


def digest(value: Any) -> str:
    """A hash, 32 hexadecimal digits, of anything that JSON can say; the order of keys does not count."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def model_fingerprint(
    model: str | Path, revision: str | None = None, config: Any = None, commit: str | None = None
) -> str:
    """The identity of a model, cheaply: no file is read whole.

    A folder: its configuration, and of each weight file the size, the header and bytes from 64 places.
    A single file (GGUF): size and bytes. A hub id: the id and the commit, which is `commit`, or
    `config._commit_hash` as transformers sets it, or else the revision. `config` is a mapping or a
    configuration of transformers.

    Raises DpkdError when a folder has no weights.
    """
    path = Path(model)
    if path.is_file():
        return digest({"weights": [_weights(path)]})
    if not path.is_dir():
        commit = commit or getattr(config, "_commit_hash", None) or revision or "main"
        return digest({"hub": str(model), "commit": commit})
    files = sorted(path.glob("*.safetensors")) or sorted(path.glob("*.gguf"))
    if not files:
        raise DpkdError(f"{path} has no weights: expected *.safetensors or *.gguf files beside config.json")
    return digest({"config": _config(path, config), "weights": [[file.name, _weights(file)] for file in files]})


def memory_fingerprint(model: Any) -> str:
    """The identity of a model of transformers in memory: its configuration, and every byte of its weights.

    It is never that of the same model in a folder, of which only samples are read.
    """
    import torch

    found = hashlib.sha256(type(model).__name__.encode())
    for name, value in sorted(model.state_dict().items()):
        found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest({"config": _kept(model.config.to_dict()), "weights": found.hexdigest()})


def fingerprint_of(settings: ModelSettings) -> str:
    """The identity of the model that some settings name: packed weights make another one. Raises as above."""
    assert settings.model is not None  # settings without a model are refused before
    found, packed = model_fingerprint(settings.model, settings.revision), quantization_of(settings)
    return found if packed is None else f"{found}/{packed}"


def _config(folder: Path, config: Any) -> dict[str, Any]:
    """The configuration without what differs between two loads of one model."""
    values: Mapping[str, Any] = {}
    if config is not None:
        values = config if isinstance(config, Mapping) else config.to_dict()
    elif (folder / "config.json").is_file():
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return _kept(values)


def _kept(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in NOT_THE_MODEL}


def _weights(file: Path) -> str:
    """Size, header of a safetensors file, and bytes at places spread evenly over the rest."""
    size = file.stat().st_size
    found = hashlib.sha256(str(size).encode())
    with file.open("rb") as stream:
        start = 0
        if file.suffix == ".safetensors":
            start = min(size, 8 + int.from_bytes(stream.read(8), "little"))
            stream.seek(0)
            found.update(stream.read(start))
        step = max(SAMPLE_BYTES, (size - start) // SAMPLES)
        for place in [*range(start, size, step), max(start, size - SAMPLE_BYTES)]:
            stream.seek(place)
            found.update(stream.read(SAMPLE_BYTES))
    return found.hexdigest()
