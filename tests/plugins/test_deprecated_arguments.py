"""A plugin that takes a hook's deprecated argument is told so, at its own file and line."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import warnings

import pytest

from dpkd.api import LossSpec
from dpkd.errors import PluginDeprecation
from dpkd.hookspecs import DEPRECATED_ARGUMENTS, Deprecated, DpkdHooks, hook
from dpkd.plugins import load_registry

TABLE = {"dpkd_losses": {"old": Deprecated("1.2", "2.0", "Take `new`.")}}


class Hooks:
    """As DpkdHooks, in a later version."""

    @hook(deprecated=TABLE)
    def dpkd_losses(self, old, new):
        """The losses."""


@pytest.fixture
def plugin(install_plugin, loss_source):
    """Installs a plugin whose hook takes the given arguments; returns its file."""

    def install(arguments: str):
        source = loss_source("fake").replace("def dpkd_losses():", f"def dpkd_losses({arguments}):")
        return install_plugin("stranger", {"fake": source}) / "stranger_fake.py"

    return install


def line_of(file) -> int:
    lines = file.read_text(encoding="utf-8").splitlines()
    return next(i for i, line in enumerate(lines, 1) if line.startswith("@hookimpl"))


def loaded(**how):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        registry = load_registry({"DPKD_PLUGINS": "stranger"}, **how)
        registry.all(LossSpec)
    return registry, [w for w in caught if issubclass(w.category, PluginDeprecation)]


def test_the_warning_stands_at_the_plugins_own_line(plugin):
    file = plugin("old")
    _, (warning,) = loaded(hooks=Hooks)
    assert (warning.filename, warning.lineno) == (str(file), line_of(file))
    assert str(warning.message) == (
        "dpkd_losses: the argument `old` is deprecated since dpkd 1.2 and goes in 2.0. Take `new`."
    )


@pytest.mark.parametrize("arguments", ["", "new"])
def test_a_plugin_that_does_not_take_it_hears_nothing(plugin, arguments):
    plugin(arguments)
    assert loaded(hooks=Hooks)[1] == []


def test_with_warnings_as_errors_it_is_the_reason_why_the_plugin_is_left_out(plugin):
    plugin("old")
    registry = load_registry({"DPKD_PLUGINS": "stranger"}, hooks=Hooks)
    assert not registry.losses
    (broken,) = registry.broken  # warnings are errors here, by pyproject.toml
    assert "PluginDeprecation: dpkd_losses: the argument `old`" in broken.reason


def test_it_is_shown_without_any_setting_of_warnings(plugin, tmp_path):
    file = plugin("old")
    program = tmp_path / "program.py"
    program.write_text(
        textwrap.dedent("""
        from dpkd.plugins import load_registry
        from dpkd.hookspecs import Deprecated, hook

        class Hooks:
            @hook(deprecated={"dpkd_losses": {"old": Deprecated("1.2", "2.0", "Take `new`.")}})
            def dpkd_losses(self, old):
                "The losses."

        load_registry({"DPKD_PLUGINS": "stranger"}, hooks=Hooks).losses
        """),
        encoding="utf-8",
    )
    environment = {**os.environ, "PYTHONPATH": str(file.parent)}
    environment.pop("PYTHONWARNINGS", None)
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, env=environment, check=True)
    assert f"{file}:{line_of(file)}: PluginDeprecation: dpkd_losses: the argument `old`" in done.stderr


def test_the_table_of_dpkd_names_hooks_that_exist():
    assert set(DEPRECATED_ARGUMENTS) <= set(vars(DpkdHooks))


def test_an_argument_that_a_hook_does_not_have_cannot_be_deprecated():
    with pytest.raises(ValueError, match="dpkd_losses has no argument older to deprecate"):

        class Wrong:
            @hook(deprecated={"dpkd_losses": {"older": TABLE["dpkd_losses"]["old"]}})
            def dpkd_losses(self, old):
                """The losses."""
