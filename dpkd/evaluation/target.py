"""What `--model` may be: a run folder, a model folder, or a hub id; a run brings its teacher and its data settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpkd.config.problems import checked
from dpkd.config.yaml_text import read_resolved
from dpkd.data.memory import is_memory
from dpkd.errors import DpkdError
from dpkd.io import read_json
from dpkd.models.fingerprint import weights_hash
from dpkd.models.locate import is_cached, is_gguf, nearest
from dpkd.models.settings import ModelSettings, TeacherSettings
from dpkd.run_folder import RunFolder, check_trust


@dataclass(frozen=True)
class EvalTarget:
    """A model to evaluate.

    data    what its run says about reading data (columns and template), as given values of the block `data`
    folder  where its results go
    """

    name: str
    model: ModelSettings
    teacher: TeacherSettings | None
    data: Mapping[str, Any]
    folder: Path


def _run(name: str) -> RunFolder | None:
    folder = RunFolder(Path(name))
    return folder if folder.config.is_file() else None


def model_of(name: str, *, trust_remote_code: bool = False) -> ModelSettings:
    """The model of a run folder, or the model itself.

    Raises DpkdError for a folder that is not there, for a run that is not finished, or whose model is not the one that
    it saved, and for the adapter or the checkpoints of one.
    """
    run = _run(name)
    if run is None:
        _refuse_missing(name)
        _refuse_parts_of_runs(Path(name))
        return ModelSettings(model=name, trust_remote_code=trust_remote_code)
    if not run.model.is_dir():
        raise DpkdError(f"{name} has no model yet: finish the run with `dpkd train --resume {name}`")
    check_model(run)
    return ModelSettings(model=str(run.model), trust_remote_code=trust_remote_code)


def check_model(run: RunFolder) -> None:
    """Compare the files of a run's model with the checksums that the run wrote down (runs of 0.1.0 did not).

    Raises DpkdError for the first that is lost or another one.
    """
    if not run.marker.is_file():
        return
    hashes = read_json(run.marker).get("model")
    for name, expected in (hashes if isinstance(hashes, dict) else {}).items():
        file = run.model / Path(name).name
        if not file.is_file() or weights_hash(file) != expected:
            raise DpkdError(
                f"{file} is {'not the file that the run saved' if file.is_file() else 'lost'} ({run.marker.name} has "
                f"its checksum). Restore it, or name {run.model} to use it unchanged."
            )


def _refuse_missing(name: str) -> None:
    """A name that is a folder's, as the one above it is there (or is that of all runs), though it could be a hub id."""
    path = Path(name)
    if path.exists() or is_gguf(name) or len(path.parts) == 1:
        return
    if not path.parent.is_dir() and path.parts[0] != "runs":
        return
    if is_cached(name):
        return
    raise DpkdError(
        f"there is no folder {name}.{nearest(path)} --model takes a run folder (dpkd train's output), a model folder "
        "or a hub id"
    )


def _refuse_parts_of_runs(path: Path) -> None:
    above = next((p for p in (path.parent, path.parent.parent) if _run(str(p)) is not None), None)
    if above is not None and path.is_dir() and path.name != "model":
        raise DpkdError(f"{path} is part of a run, not a model: pass the run, {above}")


def find_target(name: str, teacher: str | None, *, trust_remote_code: bool = False) -> EvalTarget:
    """A model with its teacher; a run's own teacher and template are used where nothing else is said.

    A teacher that the run had in memory is not to be had from its folder. Raises DpkdError when the settings of a run
    are not those that it wrote down, or its folder wants code to be run that comes with its teacher, and
    `trust_remote_code` does not allow it.
    """
    run = _run(name)
    if run is not None:
        run.check_records(run.config)
    saved = read_resolved(run.config) if run is not None else {}
    own = {key: value for key, value in (saved.get("data") or {}).items() if key in ("template", "columns")}
    settings = TeacherSettings(model=teacher, trust_remote_code=trust_remote_code) if teacher else None
    if settings is not None and settings.server is not None:
        raise DpkdError("--teacher: evaluation compares whole distributions, which no server gives; name a model")
    own_teacher = (saved.get("teacher") or {}).get("model")
    served = (saved.get("teacher") or {}).get("server")
    if teacher is None and own_teacher and not served and not (isinstance(own_teacher, str) and is_memory(own_teacher)):
        assert run is not None  # its settings name the teacher
        check_trust({"teacher": saved["teacher"]}, run.config, trust_remote_code)
        settings = checked(TeacherSettings, saved["teacher"], "teacher")
    folder = run.path / "eval" if run is not None else Path("runs") / "eval" / _filed_under(Path(name))
    return EvalTarget(name, model_of(name, trust_remote_code=trust_remote_code), settings, own, folder)


def _filed_under(path: Path) -> str:
    """The last part of a model's path that says which it is: `kd-1` of `runs/kd-1/model`."""
    path = path.resolve() if path.exists() else path
    return path.parent.name if path.name in ("model", "final") and path.parent.name else path.name
