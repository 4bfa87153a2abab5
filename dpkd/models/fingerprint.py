"""Who a model is: a short hash that changes when its weights do, and does not depend on where they lie."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from dpkd.errors import DpkdError
from dpkd.io import JsonLog, cache_folder, digest, read_json, sha256
from dpkd.models.quantization import quantization_of
from dpkd.models.settings import ModelSettings

# A file that changed this short a time ago could change again within one tick of the clock: it is not remembered.
SETTLED_NS = 2_000_000_000
# What a loader writes into a configuration: it says nothing about the model.
NOT_THE_MODEL = {"_name_or_path", "transformers_version", "_commit_hash", "dtype", "torch_dtype", "use_cache"}


def model_fingerprint(model: str | Path, revision: str | None = None) -> str:
    """The identity of a model: it changes with any byte of its weights.

    A folder: its configuration, and the name and hash of each weight file. A single file (GGUF): its hash. A hub id:
    the id and the revision. A file is hashed once: see `weights_hash`.

    Raises DpkdError when a folder has no weights.
    """
    path = Path(model)
    if path.is_file():
        return digest({"weights": [weights_hash(path)]})
    if not path.is_dir():
        return digest({"hub": str(model), "commit": revision or "main"})
    files = sorted(path.glob("*.safetensors")) or sorted(path.glob("*.gguf"))
    if not files:
        raise DpkdError(f"{path} has no weights: expected *.safetensors or *.gguf files beside config.json")
    return digest({"config": _config(path), "weights": [[file.name, weights_hash(file)] for file in files]})


def memory_fingerprint(model: Any) -> str:
    """The identity of a model of transformers in memory: its configuration, and every byte of its weights.

    It is never that of the same model in a folder, which is the hash of its files.
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


def _config(folder: Path) -> dict[str, Any]:
    """The configuration without what differs between two loads of one model."""
    file = folder / "config.json"
    return _kept(read_json(file)) if file.is_file() else {}


def _kept(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in NOT_THE_MODEL}


def weights_hash(file: Path) -> str:
    """The hash of all bytes of a file, remembered in the user's cache by its inode, size and times of change."""
    found = file.stat()
    key = [found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]
    remembered = JsonLog(cache_folder() / "fingerprints.jsonl", file=list, sha256=str)
    with suppress(DpkdError):  # a cache that cannot be read is no cache
        for row in remembered.rows():
            if row["file"] == key:
                return str(row["sha256"])
    hashed = sha256(file)
    if time.time_ns() - max(found.st_mtime_ns, found.st_ctime_ns) > SETTLED_NS:
        with suppress(DpkdError):
            remembered.append({"file": key, "sha256": hashed})
    return hashed
