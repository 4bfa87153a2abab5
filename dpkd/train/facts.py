"""run.json: versions, machine, sizes, fingerprints of data and models; what a resumed run is compared with."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch

from dpkd import __version__
from dpkd.config.resolve import Resolved
from dpkd.errors import DpkdError
from dpkd.io import read_json, write_json
from dpkd.run_folder import RunFolder

if TYPE_CHECKING:
    from dpkd.train.build import RunParts

_REBUILD = "Delete it: `dpkd train --resume` writes it again, without its comparison with the beginning of the run."


def write_facts(folder: RunFolder, resolved: Resolved, parts: RunParts) -> None:
    """Write run.json, the first file of a run."""
    libraries = ("torch", "transformers", "datasets", "accelerate", "pluggy", "pydantic", "safetensors")
    facts: dict[str, Any] = {
        "dpkd": __version__,
        "loss": {"name": resolved.loss.name, "plugin": resolved.plugin},
        "versions": {"python": platform.python_version(), **{name: version(name) for name in libraries}},
        "machine": {"platform": platform.platform(), "threads": torch.get_num_threads()},
        "command": sys.argv,
        **_own_facts(parts),
    }
    write_json(folder.facts, facts)


def _own_facts(parts: RunParts) -> dict[str, Any]:
    dev = parts.run_data.dev
    return {**parts.facts, "dev": None if dev is None else dev.fingerprint}


def change_facts(folder: RunFolder, parts: RunParts, step: int, changes: Mapping[str, Any]) -> None:
    """Note in run.json what a resumed run changed, and after which step."""
    facts = read_json(folder.facts, _REBUILD)
    note = {"after_step": step, "settings": dict(changes)}
    write_json(folder.facts, {**facts, "steps": parts.facts["steps"], "changes": [*facts.get("changes", []), note]})


def check_same(folder: RunFolder, parts: RunParts) -> None:
    """Compare what lies outside the run folder with what run.json says of the run's beginning.

    Raises DpkdError when run.json is damaged, or when data or models are others.
    """
    before, now = read_json(folder.facts, _REBUILD), _own_facts(parts)
    compared: dict[str, Callable[[Any], Any]] = {
        "the data (data.path)": lambda facts: facts["data"]["fingerprint"],
        "the plain text (terms.pretrain.corpus)": lambda facts: (facts.get("corpus") or {}).get("fingerprint"),
        "the development set (dev.path)": lambda facts: facts.get("dev"),
        "the student (student.model)": lambda facts: facts.get("models", {}).get("student"),
        "the teacher (teacher.model)": lambda facts: facts.get("models", {}).get("teacher"),
    }
    try:
        changed = [what for what, of in compared.items() if of(before) != of(now)]
    except (KeyError, TypeError, AttributeError) as error:
        raise DpkdError(f"{folder.facts} is damaged: it does not say {error}. {_REBUILD}") from error
    if changed:
        raise DpkdError(
            f"{folder.path} cannot be continued: since it began, {' and '.join(changed)} changed. "
            "Put the old ones back, or start a new run."
        )
