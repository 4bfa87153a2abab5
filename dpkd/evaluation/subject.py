"""What `--model` may be: a run folder, a model folder, or a hub id; a run brings its teacher and its data settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from dpkd.data.settings import DataSettings
from dpkd.errors import DpkdError
from dpkd.evaluation.evaluate import EvaluationSettings
from dpkd.models.settings import ModelSettings, TeacherSettings
from dpkd.run_folder import RunFolder
from dpkd.text.settings import SamplingSettings

__all__ = ["model_of", "subject"]


def _run(name: str) -> RunFolder | None:
    folder = RunFolder(Path(name))
    return folder if folder.config.is_file() else None


def model_of(name: str) -> ModelSettings:
    """The model of a run folder, or the model itself. Raises DpkdError for a run that is not finished."""
    run = _run(name)
    if run is None:
        return ModelSettings(model=name)
    if not run.model.is_dir():
        raise DpkdError(f"{name} has no model yet: finish the run with `dpkd train --resume {name}`")
    return ModelSettings(model=str(run.model))


def subject(
    model: str,
    data: str,
    *,
    teacher: str | None,
    sampling: SamplingSettings,
    seed: int,
    limit: int | None,
    output: Path | None,
) -> EvaluationSettings:
    """Evaluation settings of a model; a run's own teacher, template and lengths are used where nothing else is said."""
    run = _run(model)
    saved: dict[str, Any] = yaml.safe_load(run.config.read_text(encoding="utf-8")) if run is not None else {}
    own_data = {
        key: value
        for key, value in saved.get("data", {}).items()
        if key in ("template", "max_prompt_tokens", "max_tokens", "columns")
    }
    teacher_settings = TeacherSettings(model=teacher) if teacher else None
    if teacher is None and saved.get("teacher", {}).get("model"):
        teacher_settings = TeacherSettings.model_validate(saved["teacher"])
    if output is None:
        output = (run.path if run is not None else Path("runs") / "eval" / Path(model).name) / "eval" / Path(data).stem
    return EvaluationSettings(
        model_of(model),
        DataSettings(**{**own_data, "path": data, "limit": limit}),
        teacher_settings,
        sampling,
        seed,
        output,
    )
