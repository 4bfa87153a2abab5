"""Optional trackers beside the run folder's own log: TensorBoard, Weights & Biases, trackio, through accelerate.

Each is imported only when asked for. Only the main process makes them.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpkd.api import Callback, Training
from dpkd.errors import DpkdError
from dpkd.io import write_text

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

PROJECT = "dpkd"


class Trackers(Callback):
    """All trackers of a run as one; without names it does nothing.

    folder    the run folder; what trackers write locally goes beneath it (trackio has a folder of its own)
    config    the resolved settings, shown beside the curves

    Raises DpkdError for a tracker whose package is not installed.
    """

    def __init__(self, names: Sequence[str], folder: Path, run_name: str, config: Mapping[str, Any]) -> None:
        self._open: list[GeneralTracker] = []
        try:
            for name in dict.fromkeys(names):
                self._open.append(_opened(name, folder, run_name, config))
        except BaseException:
            self.close()
            raise

    def log(self, step: int, flat_metrics: Mapping[str, float]) -> None:
        """Send the metrics of a step to each."""
        for tracker in self._open:
            tracker.log(dict(flat_metrics), step=step)

    def on_log(self, training: Training, step: int, line: Mapping[str, Any]) -> None:
        self.log(step, line)

    def on_evaluate(self, training: Training, step: int, line: Mapping[str, float]) -> None:
        self.log(step, {f"dev/{name}": value for name, value in line.items() if name != "step"})

    def on_end(self, training: Training) -> None:
        self.close()

    def close(self) -> None:
        """End the run in each; a second call does nothing."""
        while self._open:
            self._open.pop().finish()


def _opened(name: str, folder: Path, run_name: str, config: Mapping[str, Any]) -> GeneralTracker:
    try:
        importlib.import_module(name)
    except ImportError as error:
        raise _missing(name, str(error)) from error
    from accelerate import PartialState
    from accelerate.tracking import TensorBoardTracker, TrackioTracker, WandBTracker

    PartialState()  # a run has made it already; accelerate's log does nothing without
    if name == "tensorboard":
        tracker = TensorBoardTracker("tensorboard", logging_dir=folder)
        tracker.start()
        shown = json.dumps({"run": run_name, **config}, indent=2, default=str, ensure_ascii=False)
        tracker.log({"config": f"```json\n{shown}\n```"})
        return tracker
    # A resumed run continues its own curves, by what the tracker called it. A new run resumes none: trackio knows runs
    # by name alone, and that could be another folder's. wandb drops steps before the last that it has seen.
    file = folder / f"{name}.id"
    kept = file.read_text(encoding="utf-8").strip() if file.exists() else None
    resume = "never" if kept is None else "allow"
    if name == "wandb":
        tracker = WandBTracker(PROJECT, name=run_name, dir=str(folder), config=dict(config), id=kept, resume=resume)
    else:
        tracker = TrackioTracker(PROJECT, name=kept or run_name, config=dict(config), resume=resume)
    tracker.start()
    write_text(file, f"{tracker.run.id if name == 'wandb' else tracker.run.name}\n")
    return tracker


def _missing(tracker: str, why: str) -> DpkdError:
    return DpkdError(
        f"train.trackers asks for {tracker}, which cannot be imported ({why}). "
        f"Install it with `pip install {tracker}`, or leave {tracker} out."
    )


def check_trackers(names: Sequence[str]) -> None:
    """Raises DpkdError for a tracker whose package is not installed; nothing is imported."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise _missing(name, "it is not installed")
