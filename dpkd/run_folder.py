"""Where things are in a run folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dpkd.errors import DpkdError

__all__ = ["RunFolder"]


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

    @classmethod
    def create(cls, output: str | None, loss: str) -> RunFolder:
        """A new run folder: the one asked for, or the next free `runs/LOSS-N`.

        Raises DpkdError when the folder holds a run already.
        """
        if output is None:
            number = 1
            while (Path("runs") / f"{loss}-{number}").exists():
                number += 1
            folder = cls(Path("runs") / f"{loss}-{number}")
        else:
            folder = cls(Path(output))
        if folder.config.exists():
            raise DpkdError(
                f"{folder.path} holds a run already. Continue it with `dpkd train --resume {folder.path}`, "
                "or choose another --output."
            )
        if folder.path.exists() and not folder.path.is_dir():
            raise DpkdError(f"--output {folder.path} is a file; expected a folder that is new or empty")
        folder.path.mkdir(parents=True, exist_ok=True)
        return folder

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
