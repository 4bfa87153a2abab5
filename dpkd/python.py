"""dpkd from Python: the same runs as from the shell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from dpkd.evaluation.results import Evaluation
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
    model: str, data: str, *, teacher: str | None = None, seeds: Sequence[int] | None = None, greedy: bool = False,
    max_new_tokens: int = 256, batch_size: int = 32, dtype: str = "float32", limit: int | None = None,
    rewards: bool = False, long_prompts: Literal["error", "skip"] = "error", settings: Mapping[str, Any] | None = None,
    output: str | Path | None = None,
) -> Evaluation:  # fmt: skip
    """Score a run, model folder or hub id on a set, as `dpkd eval` does; nothing is written without `output`.

    `settings` maps names of the block `data` to values (`{"template": "chat"}`). `evaluate(...)["rouge_l"]` is the
    mean over seeds. Raises SettingsError for mistakes in the settings, DpkdError when a row cannot be scored.
    """
    from dpkd.config.problems import checked
    from dpkd.data.settings import DataSettings
    from dpkd.evaluation.evaluate import PAPER_SEEDS, Bench, EvaluationSettings
    from dpkd.evaluation.sets import find_set
    from dpkd.evaluation.subject import find_subject
    from dpkd.text.settings import SamplingSettings

    one, subject = find_set(data), find_subject(model, teacher)
    rows = checked(DataSettings, one.given(subject.data, {"limit": limit, **(settings or {})}), "data")
    sampling = SamplingSettings(
        temperature=0.0 if greedy else 1.0, max_new_tokens=max_new_tokens, batch_size=batch_size
    )
    how = EvaluationSettings(sampling, tuple(seeds or PAPER_SEEDS), rewards, long_prompts=long_prompts)
    return Bench(subject.model, subject.teacher, dtype=dtype).evaluate(
        one.name, rows, how, output=Path(output) if output is not None else None
    )
