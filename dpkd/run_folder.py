"""Where things are in a run folder."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from dpkd.errors import DpkdError
from dpkd.io import read_json, sha256
from dpkd.locks import folder_lock


@dataclass(frozen=True)
class RunFolder:
    """A run folder is all there is to know about a run."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.resolved.yaml"

    @property
    def facts(self) -> Path:
        return self.path / "run.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        return self.path / "samples.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def card(self) -> Path:
        return self.path / "README.md"

    def _repr_html_(self) -> str:
        """For notebooks: where the run is, how it ended, and its loss over the steps."""
        from html import escape

        from dpkd.run_metrics import read_metrics

        rows = read_metrics(self.metrics) if self.metrics.exists() else []
        points = [(row["step"], row["loss/main"]) for row in rows if math.isfinite(row.get("loss/main", math.nan))]
        head = f"<code>{escape(str(self.path))}</code>"
        if not points:
            return f"<div>run {head}</div>"
        state = "finished" if self.is_finished else "not finished"
        step, loss = points[-1]
        return f"<div>run {head}, {state}: step {step:,}, loss {loss:.4g}<br>{_line(points)}</div>"

    @property
    def best(self) -> Path:
        """The best models by the development set, while the run goes on."""
        return self.path / ".best"

    @property
    def marker(self) -> Path:
        """Written last of all when a run is finished: its steps, the step of its model, and checksums."""
        return self.path / "finished.json"

    @property
    def is_finished(self) -> bool:
        return self.marker.is_file() and self.model.is_dir()

    @property
    def _records(self) -> tuple[Path, ...]:
        return self.config, self.facts, self.metrics, self.samples, self.path / "dev.jsonl"

    def records(self) -> dict[str, str]:
        """The SHA-256 of what the run wrote down on its way, by file: nothing changes it once the run is finished."""
        return {file.name: sha256(file) for file in self._records if file.is_file()}

    def check_records(self, *only: Path) -> None:
        """Compare what a finished run wrote down (`only`: these files) with its checksums; older runs have none.

        Raises DpkdError for the first file that is lost or another one.
        """
        again = f"delete {self.marker.name}: `dpkd train --resume {self.path}` then completes the run again."
        facts = read_json(self.marker, f"To go on, {again}") if self.marker.is_file() else {}
        records = facts.get("records")
        known: Mapping[str, Any] = records if isinstance(records, Mapping) else {}
        for file in only or self._records:
            if file.name not in known or (file.is_file() and sha256(file) == known[file.name]):
                continue
            what = "not the file that the run wrote" if file.is_file() else "lost"
            advice = f"; {self.facts.name} has the command of the run." if file == self.config else f", or {again}"
            raise DpkdError(f"{file} is {what} ({self.marker.name} has its checksum). Restore it{advice}")

    def lock(self) -> AbstractContextManager[None]:
        """For the time of the block no other process may write here. Raises DpkdError, naming who does."""
        return folder_lock(self.path, self.checkpoints.name)

    def _contents(self) -> list[str]:
        """Names of what the folder holds, without what a run that was killed at its very start leaves behind."""
        return sorted(e.name for e in self.path.iterdir() if not e.name.startswith(".") and e != self.facts)

    @classmethod
    def check_new(cls, output: str | None) -> None:
        """Raises DpkdError when the folder that is asked for holds something; nothing is made yet."""
        if output is None:
            return
        folder = cls(Path(output))
        if folder.config.exists():
            raise DpkdError(
                f"{folder.path} holds a run already. Continue it with `dpkd train --resume {folder.path}`, "
                "or choose another --output."
            )
        if folder.path.exists() and not folder.path.is_dir():
            raise DpkdError(f"--output {folder.path} is a file; expected a folder that is new or empty")
        if folder.path.exists() and (names := folder._contents()):
            raise DpkdError(
                f"--output {folder.path} holds {', '.join(names[:3])}{' and more' if len(names) > 3 else ''}; "
                "expected a folder that is new or empty"
            )

    @classmethod
    def create(cls, output: str | None, loss: str) -> RunFolder:
        """A new run folder: the one asked for, or the next free `runs/LOSS-N`.

        Raises DpkdError when the folder holds something.
        """
        cls.check_new(output)
        if output is not None:
            Path(output).mkdir(parents=True, exist_ok=True)
            return cls(Path(output))
        Path("runs").mkdir(exist_ok=True)
        for number in count(1):
            path = Path("runs") / f"{loss}-{number}"
            with suppress(FileExistsError):  # made by an earlier run, or just now by another one
                path.mkdir()
                return cls(path)
        raise AssertionError("there is always a next number")

    @classmethod
    def existing(cls, path: str | Path) -> RunFolder:
        """The folder of an earlier run.

        Raises DpkdError when there is none.
        """
        folder = cls(Path(path))
        if not folder.config.is_file():
            raise DpkdError(
                f"{folder.path} is not a run folder: it has no config.resolved.yaml. "
                "A run folder is what `dpkd train --output` names; it is printed at the start of each run."
            )
        return folder


@dataclass(frozen=True)
class SweepFolder:
    """The folder of a sweep: its run folders, and what the sweep says of them."""

    path: Path

    @property
    def record(self) -> Path:
        """The runs of the sweep, whether they have a folder or not, and what became of each."""
        return self.path / "sweep.json"

    @property
    def choices(self) -> Path:
        """By stage: the run that was best on dev rows, among which."""
        return self.path / "choices.json"

    def worker_log(self, number: int) -> Path:
        """What a process that makes several runs says beside their own logs."""
        return self.path / f"worker-{number}.log"


def _line(points: Sequence[tuple[float, float]], width: int = 320, height: int = 80) -> str:
    """Points as a line in SVG, with the largest and the smallest value beside it."""
    (left, right), (low, high) = ((min(v), max(v)) for v in zip(*points, strict=True))
    across, up = (right - left) or 1.0, (high - low) or 1.0
    path = " ".join(f"{width * (x - left) / across:.1f},{height * (high - y) / up:.1f}" for x, y in points)
    text = "font-size='11' fill='currentColor'"
    return (
        f"<svg width='{width + 70}' height='{height + 16}' role='img' aria-label='loss over the steps'>"
        f"<g transform='translate(2,8)'><polyline points='{path}' fill='none' stroke='currentColor'/>"
        f"<text x='{width + 6}' y='8' {text}>{high:.4g}</text>"
        f"<text x='{width + 6}' y='{height}' {text}>{low:.4g}</text></g></svg>"
    )


def check_trust(values: Mapping[str, Any], source: Path, trusted: bool) -> None:
    """Settings that come from a folder never decide that somebody's code runs: the present command does.

    Raises DpkdError when they ask for it and the command does not allow it.
    """
    asking = [name for name, block in values.items() if isinstance(block, Mapping) and block.get("trust_remote_code")]
    if asking and not trusted:
        models = " and ".join(f"the {name} {values[name].get('model')}" for name in asking)
        raise DpkdError(
            f"{source} asks to run Python code that comes with {models} (trust_remote_code). A run folder cannot "
            "decide that: pass --trust-remote-code if you trust this code and whoever gave you this folder."
        )
