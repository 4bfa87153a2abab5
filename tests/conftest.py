"""Fixtures for all tests: plugins that look installed."""

from __future__ import annotations

import os
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizer_kinds import SHARED, build_tokenizer

# Before torch is imported: tests run side by side, one on each core, and products round by the number of threads, so
# that their processes must have as many.
os.environ.setdefault("OMP_NUM_THREADS", "1")

InstallPlugin = Callable[..., Path]

LOSS_SOURCE = '''
from dpkd.api import Card, LossConfig, LossSpec, Signal, Source, TokenLoss, hookimpl, setting


class Config(LossConfig):
    """Settings of the fake."""

    strength: float = setting(0.5, description="how strong", source="made up", gt=0, lt=1)


class Fake(TokenLoss[Config]):
    def forward(self, x):
        return x.student_logits.sum(-1) * self.config.strength


SPEC = LossSpec(
    name="NAME", loss=Fake, config=Config, reads=frozenset({Signal.STUDENT_LOGITS, Signal.TEACHER_LOGITS}),
    card=Card("A fake", "Nothing.", "0", (Source("No paper", "https://example.org/none"),), "never", "always"),
)


@hookimpl
def dpkd_losses():
    return [SPEC]
'''


@pytest.fixture
def install_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[InstallPlugin]:
    """`install(distribution, {entry point: source of its module})`: a folder that importlib.metadata finds.

    A source of None leaves the module out. Returns the folder, for PYTHONPATH of another process.
    """
    site = tmp_path / "site"
    modules: list[str] = []

    def install(distribution: str, sources: dict[str, str | None], version: str = "1.0") -> Path:
        info = site / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        lines = ["[dpkd]"]
        for name, source in sources.items():
            module = f"{distribution}_{name}".replace("-", "_").replace(".", "_")
            modules.append(module)
            lines.append(f"{name} = {module}")
            if source is not None:
                (site / f"{module}.py").write_text(textwrap.dedent(source), encoding="utf-8")
        metadata = f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n"
        (info / "METADATA").write_text(metadata, encoding="utf-8")
        (info / "entry_points.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        monkeypatch.syspath_prepend(str(site))
        return site

    yield install
    for module in modules:
        sys.modules.pop(module, None)


@pytest.fixture
def loss_source() -> Callable[[str], str]:
    """The source of a plugin's module with one good loss of a name."""
    return lambda name: LOSS_SOURCE.replace("NAME", name)


@pytest.fixture
def tokenizer_of() -> Callable[..., Any]:
    return build_tokenizer


@pytest.fixture
def shared_model() -> Callable[[str], str]:
    """The folder of a real small model, or a skip."""

    def find(name: str) -> str:
        folder = SHARED / "models" / name
        if not folder.is_dir():
            pytest.skip(f"no {folder}: set DPKD_SHARED to the folder of the shared models")
        return str(folder)

    return find
