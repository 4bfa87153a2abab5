"""docs/hooks.md lists every hook with its arguments."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

from dpkd.hookspecs import DpkdHooks

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "hooks.md").read_text(encoding="utf-8")


def in_the_code() -> dict[str, list[str]]:
    """Hook → its arguments, in order."""
    hooks = {name: hook for name, hook in vars(DpkdHooks).items() if hasattr(hook, "dpkd_spec")}
    return {name: list(inspect.signature(hook).parameters)[1:] for name, hook in hooks.items()}


def on_the_page() -> dict[str, list[str]]:
    found = re.findall(r"^## `(\w+)\((.*?)\)`$", PAGE, flags=re.MULTILINE)
    return {name: [a.strip() for a in arguments.split(",") if a.strip()] for name, arguments in found}


def test_every_hook_is_there_with_its_arguments():
    assert in_the_code()
    assert on_the_page() == in_the_code()


def test_every_public_method_is_a_hook():
    assert {name for name in vars(DpkdHooks) if not name.startswith("_")} == set(in_the_code())


def test_the_example_is_that_of_the_example_package():
    block, *_ = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    assert block in (DOCS / "examples/dpkd-hello/dpkd_hello.py").read_text(encoding="utf-8")
