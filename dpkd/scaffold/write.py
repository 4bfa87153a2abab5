"""Writes a loss package from a template: four files that work as they are."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from string import Template

from dpkd.errors import SettingsError
from dpkd.scaffold.names import Names

KINDS = ("token", "pair", "rollout")
_SUFFIX = ".template"  # so that no tool takes a template for a module or a test


def rendered(names: Names, kind: str) -> dict[str, str]:
    """File name → text of a package.

    Raises SettingsError for an unknown kind.
    """
    if kind not in KINDS:
        raise SettingsError([f"--kind {kind}: should be {', '.join(KINDS[:-1])} or {KINDS[-1]}"])
    words = names.as_dict()
    called = {"module.py": f"{names.module}.py", "test.py": f"{names.test}.py"}
    texts = {}
    for folder in ("common", kind):
        for template in sorted(files("dpkd.scaffold").joinpath("templates", folder).iterdir(), key=lambda t: t.name):
            if template.name.endswith(_SUFFIX):
                file = template.name.removesuffix(_SUFFIX)
                texts[called.get(file, file)] = Template(template.read_text(encoding="utf-8")).substitute(words)
    return texts


def write_package(names: Names, kind: str, folder: Path) -> list[Path]:
    """Write a package into a folder that is new or empty; returns the files, in order of name.

    Raises SettingsError for an unknown kind, or a folder that cannot be used.
    """
    texts = rendered(names, kind)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise SettingsError(
            [f"new-loss {names.name}: {folder} exists and is not empty; name another folder with --output"]
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file, text in texts.items():
            (folder / file).write_text(text, encoding="utf-8")
    except OSError as error:
        raise SettingsError([f"new-loss {names.name}: cannot write into {folder}: {error.strerror}"]) from error
    return [folder / file for file in sorted(texts)]
