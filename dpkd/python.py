"""dpkd from Python: the same runs as from the shell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpkd.evaluation.evaluate import Evaluation
    from dpkd.run_folder import RunFolder

__all__ = ["evaluate", "train"]


def train(
    *,
    loss: str,
    teacher: str | None = None,
    student: str | None = None,
    data: str | None = None,
    output: str | None = None,
    seed: int | None = None,
    config: Sequence[str | Path] = (),
    settings: Mapping[str, Any] | None = None,
) -> RunFolder:
    """Distil, as `dpkd train` does; `settings` maps dotted paths to values. Returns the run's folder.

    Raises SettingsError with every mistake in the settings, DpkdError for what the run stumbles over.
    """
    from dpkd.config.layers import file_layer, flag_layer
    from dpkd.config.resolve import resolve
    from dpkd.engine.run import train as run
    from dpkd.host import load_host

    named = {
        "loss.name": loss, "teacher.model": teacher, "student.model": student, "data.path": data,
        "output": output, "seed": seed,
    }  # fmt: skip
    layers = [file_layer(Path(path)) for path in config]
    layers += [flag_layer("train()", path, value) for path, value in named.items() if value is not None]
    layers += [flag_layer("settings", path, value) for path, value in (settings or {}).items()]
    return run(resolve(layers, load_host()))


def evaluate(
    model: str, data: str, *, teacher: str | None = None, greedy: bool = False, max_new_tokens: int = 256,
    limit: int | None = None, seed: int = 10, output: str | Path | None = None,
) -> Evaluation:  # fmt: skip
    """Score a run, model folder or hub id on held-out rows, as `dpkd eval` does."""
    from dpkd.evaluation.evaluate import evaluate as run
    from dpkd.evaluation.subject import subject
    from dpkd.text.settings import SamplingSettings

    sampling = SamplingSettings(temperature=0.0 if greedy else 1.0, max_new_tokens=max_new_tokens)
    where = Path(output) if output is not None else None
    return run(subject(model, data, teacher=teacher, sampling=sampling, seed=seed, limit=limit, output=where))
