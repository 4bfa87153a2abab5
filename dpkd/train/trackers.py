"""Optional trackers beside the run folder's own log: TensorBoard, Weights & Biases, trackio.

Each is one class with `log` and `close`, imported only when asked for. Only the main process makes one.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from dpkd.errors import DpkdError
from dpkd.io import write_text

_PROJECT = "dpkd"


class Tracker(Protocol):
    """Something that draws scalars over steps."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add one point to the curve of each metric."""

    def close(self) -> None:
        """Write what is left, and end the run."""


class Trackers:
    """All trackers of a run as one; without names it does nothing.

    folder    the run folder; what trackers write locally goes beneath it (trackio has a folder of its own)
    config    the resolved settings, shown beside the curves

    Raises DpkdError for an unknown name, or a tracker whose package is not installed.
    """

    def __init__(self, names: Sequence[str], folder: Path, run_name: str, config: Mapping[str, Any]) -> None:
        unknown = [name for name in names if name not in TRACKERS]
        if unknown:
            found, known = ", ".join(unknown), ", ".join(TRACKERS)
            raise DpkdError(f"train.trackers: expected some of {known}, found {found}")
        self._open: list[Tracker] = []
        try:
            for name in dict.fromkeys(names):
                self._open.append(TRACKERS[name](folder, run_name, config))
        except BaseException:
            self.close()
            raise

    def log(self, step: int, flat_metrics: Mapping[str, float]) -> None:
        """Send the metrics of a step to each."""
        for tracker in self._open:
            tracker.log(step, flat_metrics)

    def close(self) -> None:
        """End the run in each; a second call does nothing."""
        while self._open:
            self._open.pop().close()


class _TensorBoard:
    def __init__(self, folder: Path, run_name: str, config: Mapping[str, Any]) -> None:
        _imported("tensorboard", "tensorboard")
        writer = _imported("torch.utils.tensorboard", "tensorboard").SummaryWriter
        self._generation_model = writer(log_dir=str(folder / "tensorboard"))
        shown = json.dumps({"run": run_name, **config}, indent=2, default=str, ensure_ascii=False)
        self._generation_model.add_text("config", f"```json\n{shown}\n```")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._generation_model.add_scalar(name, value, step)

    def close(self) -> None:
        self._generation_model.close()


class _Wandb:
    """A resumed run continues its own curves: the id that wandb gave is kept in the run folder.

    wandb drops steps before the last it has seen: steps that a resumed run repeats keep their first values.
    """

    def __init__(self, folder: Path, run_name: str, config: Mapping[str, Any]) -> None:
        wandb = _imported("wandb", "wandb")
        kept = _Kept(folder / "wandb.id")
        self._run = wandb.init(
            project=_PROJECT,
            name=run_name,
            dir=str(folder),
            config=dict(config),
            id=kept.name,
            resume="never" if kept.name is None else "allow",
        )
        kept.keep(self._run.id)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


class _Trackio:
    """A resumed run continues its own curves: the name that trackio gave is kept in the run folder.

    trackio knows runs by name alone, so a new run resumes none: that could be another folder's of its name.
    """

    def __init__(self, folder: Path, run_name: str, config: Mapping[str, Any]) -> None:
        trackio = _imported("trackio", "trackio")
        kept = _Kept(folder / "trackio.id")
        self._run = trackio.init(
            project=_PROJECT,
            name=kept.name or run_name,
            config=dict(config),
            resume="never" if kept.name is None else "allow",
        )
        kept.keep(self._run.name)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


class _Kept:
    """What a tracker calls this run, remembered in a file of the run folder."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.name = path.read_text(encoding="utf-8").strip() if path.exists() else None

    def keep(self, name: str) -> None:
        write_text(self._path, f"{name}\n")


def _imported(module: str, tracker: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise _missing(tracker, str(error)) from error


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


TRACKERS: Mapping[str, Callable[[Path, str, Mapping[str, Any]], Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
    "trackio": _Trackio,
}
