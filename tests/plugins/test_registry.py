"""The registry on plugins that are found as installed ones are: through `.dist-info` folders on the path."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dpkd.api import LossSpec, MetricSpec, SamplerSpec, SourceSpec, TeacherSpec
from dpkd.errors import DpkdError
from dpkd.hookspecs import KINDS, DpkdHooks, kind_of
from dpkd.plugins import Registry, load_registry

GOOD = {"DPKD_PLUGINS": "stranger"}


def broken_reason(registry: Registry) -> str:
    assert not registry.losses
    (only,) = registry.broken
    return only.reason


def test_a_good_plugin_is_registered_with_its_origin(install_plugin, loss_source: Callable[[str], str]) -> None:
    site = install_plugin("stranger", {"curved": loss_source("curved")}, version="2.1")
    loss = load_registry(GOOD).get(LossSpec, "curved")
    assert (loss.distribution, loss.version, loss.entry_point) == ("stranger", "2.1", "curved")
    assert Path(loss.file) == site / "stranger_curved.py"
    assert loss.spec.name == "curved"


def test_built_in_losses_come_in_by_the_same_door(install_plugin, loss_source: Callable[[str], str]) -> None:
    install_plugin("stranger", {"curved": loss_source("curved")})
    registry = load_registry({})
    assert registry.losses["kd"].distribution == "dpkd"
    assert registry.losses["curved"].distribution == "stranger"
    assert list(registry.losses) == sorted(registry.losses)


def test_one_broken_plugin_never_stops_the_others(install_plugin, loss_source: Callable[[str], str]) -> None:
    install_plugin("stranger", {"aaa": "1 / 0", "curved": loss_source("curved"), "zzz": "import nowhere_at_all"})
    registry = load_registry(GOOD)
    assert list(registry.losses) == ["curved"]
    assert [(b.entry_point, b.distribution) for b in registry.broken] == [("aaa", "stranger"), ("zzz", "stranger")]
    assert [b.reason for b in registry.broken] == [
        "ZeroDivisionError: division by zero",
        "ModuleNotFoundError: No module named 'nowhere_at_all'",
    ]


HOOK = "from dpkd.api import hookimpl\n@hookimpl\n"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (None, "ModuleNotFoundError: No module named 'stranger_x'"),
        ("def broken(:", "SyntaxError: "),
        ("import sys; sys.exit(3)", "SystemExit: 3"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt: "),
        ("class Mute(Exception):\n    def __str__(self): raise Mute\nraise Mute", "Mute (its message cannot be shown)"),
        (HOOK + "def dpkd_losses(): raise GeneratorExit('now')", "GeneratorExit: now"),
        (HOOK + "def dpkd_loss(): return []", "there is no hook 'dpkd_loss'; did you mean dpkd_losses?"),
        ("def dpkd_losses(): return []", "implements no hook: expected a function `dpkd_losses`"),
        (HOOK + "def dpkd_losses(): raise OSError('no disk')", "OSError: no disk"),
        (HOOK + "def dpkd_losses(): raise SystemExit(4)", "SystemExit: 4"),
        (HOOK + "def dpkd_losses(): return None", "must return a list of LossSpec, but returned None"),
        (HOOK + "def dpkd_losses(): return 3", "must return a list of LossSpec, but returned int"),
        (HOOK + "def dpkd_losses(): return ['kd']", "must return LossSpecs, but the list holds str"),
        (HOOK + "def dpkd_losses():\n    yield 'kd'", "must return LossSpecs, but the list holds str"),
        (HOOK + "def dpkd_losses():\n    raise KeyError('late')\n    yield", "KeyError: 'late'"),
    ],
    ids=[
        "module-absent",
        "syntax",
        "leaves-at-import",
        "interrupts-at-import",
        "cannot-say-why",
        "hook-raises-no-exception",
        "misspelt-hook",
        "not-marked",
        "hook-raises",
        "hook-leaves",
        "none",
        "not-a-list",
        "not-a-spec",
        "generator-of-strangers",
        "generator-raises",
    ],
)
def test_a_broken_plugin_is_listed_with_its_reason(source: str | None, reason: str, install_plugin) -> None:
    install_plugin("stranger", {"x": source})
    assert reason in broken_reason(load_registry(GOOD))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("name='Curved Loss'", "the name 'Curved Loss' should be lower-case letters and digits"),
        ("config=dict", "the config of 'curved' must be a subclass of dpkd.api.LossConfig"),
        ("loss=object", "the loss of 'curved' must be a subclass of TokenLoss, PairLoss or RolloutLoss"),
        ("config=Required", "the default settings of 'curved' do not work: "),
        ("config=Named", "the config of 'curved' has a setting `name`"),
        ("reads=lambda config: config.absent", "the default settings of 'curved' do not work: "),
        ("suggests={'loss': {'strength': 0.1}}", "'curved' suggests `loss`"),
    ],
)
def test_a_spec_that_does_not_hold(change: str, reason: str, install_plugin, loss_source: Callable[[str], str]) -> None:
    source = loss_source("curved").replace(
        "@hookimpl",
        "from dataclasses import replace\n"
        "class Required(LossConfig):\n    mu: float\n"
        "class Named(LossConfig):\n    name: str = 'x'\n"
        f"SPEC = replace(SPEC, {change})\n@hookimpl",
    )
    install_plugin("stranger", {"curved": source})
    assert reason in broken_reason(load_registry(GOOD))


def test_two_losses_of_one_name_are_an_error_that_names_both(install_plugin, loss_source: Callable[[str], str]) -> None:
    install_plugin("stranger", {"curved": loss_source("curved"), "other": loss_source("other")})
    site = install_plugin("guest", {"curved": loss_source("curved")}, version="3.0")
    registry = load_registry({"DPKD_PLUGINS": "stranger,guest"})
    with pytest.raises(DpkdError) as caught:
        registry.get(LossSpec, "curved")
    message = str(caught.value)
    assert f"stranger 1.0 ({site / 'stranger_curved.py'})" in message
    assert f"guest 3.0 ({site / 'guest_curved.py'})" in message
    with pytest.raises(DpkdError, match="two losses are called 'curved'"):
        registry.check_conflicts(LossSpec)
    assert registry.get(LossSpec, "other").distribution == "stranger"
    assert load_registry({"DPKD_PLUGINS": "guest"}).get(LossSpec, "curved").distribution == "guest"


def test_unknown_name_gets_the_nearest_ones_and_what_failed(install_plugin, loss_source: Callable[[str], str]) -> None:
    install_plugin("stranger", {"curved": loss_source("curved"), "flat": "import nowhere_at_all"})
    registry = load_registry(GOOD)
    with pytest.raises(DpkdError) as caught:
        registry.get(LossSpec, "curve")
    assert str(caught.value) == (
        "no loss is called 'curve'; did you mean curved?; DPKD_PLUGINS='stranger' restricts the plugins; "
        "these plugins failed to load: flat (stranger); see `dpkd list-losses --broken`"
    )
    with pytest.raises(DpkdError, match=r"the plugin flat \(stranger\) failed to load: ModuleNotFoundError"):
        registry.get(LossSpec, "flat")
    with pytest.raises(DpkdError, match=r"no loss is called 'flatt'.*the plugin flat \(stranger\) failed to load"):
        registry.get(LossSpec, "flatt")


def test_a_restriction_that_names_nobody_says_so(install_plugin, loss_source: Callable[[str], str]) -> None:
    install_plugin("stranger", {"curved": loss_source("curved")})
    registry = load_registry({"DPKD_PLUGINS": "curved, nope"})
    assert registry.unmatched == ("nope",)
    with pytest.raises(DpkdError, match="restricts the plugins, and matches no plugin by nope"):
        registry.get(LossSpec, "bent")


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("curved", ["curved"]),
        ("guest", ["bent"]),
        ("curved, guest", ["bent", "curved"]),
        ("Two_Words", ["twofold"]),
        ("", []),
        ("nobody", []),
    ],
)
def test_dpkd_plugins_restricts_by_entry_point_or_distribution(
    choice: str, names: list[str], install_plugin, loss_source: Callable[[str], str]
) -> None:
    install_plugin("stranger", {"curved": loss_source("curved"), "flat": loss_source("flat")})
    install_plugin("guest", {"bent": loss_source("bent")})
    install_plugin("two-words", {"twofold": loss_source("twofold")})
    registry = load_registry({"DPKD_PLUGINS": choice})
    assert list(registry.losses) == names
    with pytest.raises(DpkdError, match=re.escape(f"DPKD_PLUGINS={choice!r} restricts the plugins")):
        registry.get(LossSpec, "round")


def test_nothing_is_kept_between_registries(install_plugin, loss_source: Callable[[str], str]) -> None:
    before = load_registry(GOOD)
    install_plugin("stranger", {"curved": loss_source("curved")})
    assert not before.losses
    assert list(load_registry(GOOD).losses) == ["curved"]


COUNTING = """
import pathlib
log = pathlib.Path(__file__).with_suffix(".log")
log.write_text((log.read_text() if log.exists() else "") + "imported ")
"""
SPEC_OF = {
    SamplerSpec: "SamplerSpec('mine', 'x', open=print)",
    TeacherSpec: "TeacherSpec('mine', 'x', open=print, offer=print)",
    SourceSpec: "SourceSpec('mine', 'x', open=print, config=SourceConfig)",
    MetricSpec: "MetricSpec('mine', '', '', 'x', per_row=len)",
}


def plugin_of(spec: type, *, name: str = "mine") -> str:
    kind = kind_of(spec)
    made = SPEC_OF[spec].replace("mine", name)
    return f"import dpkd.api\nfrom dpkd.api import *\n@dpkd.api.hookimpl\ndef {kind.hook}():\n    return [{made}]\n"


def test_the_table_has_every_hook_once() -> None:
    hooks = {name for name in vars(DpkdHooks) if name.startswith("dpkd_")}
    assert sorted(kind.hook for kind in KINDS) == sorted(hooks)


@pytest.mark.parametrize("spec", SPEC_OF)
@pytest.mark.parametrize("prefixed", [True, False])
def test_every_kind_is_found_behind_one_group(spec: type, prefixed: bool, install_plugin) -> None:
    name = f"{kind_of(spec).prefix}mine" if prefixed else "whatever"
    install_plugin("stranger", {name: plugin_of(spec)})
    registry = load_registry(GOOD)
    found = registry.get(spec, "mine")
    assert (type(found.spec), found.distribution, found.entry_point) == (spec, "stranger", name)
    assert registry.all(spec)["mine"] == found
    assert registry.broken == []


@pytest.mark.parametrize("spec", SPEC_OF)
def test_an_unknown_name_of_any_kind_gets_the_nearest(spec: type, install_plugin) -> None:
    install_plugin("stranger", {"whatever": plugin_of(spec)})
    with pytest.raises(DpkdError, match=f"no {kind_of(spec).name} is called 'mines'; did you mean mine?"):
        load_registry(GOOD).get(spec, "mines")


def test_a_plugin_is_imported_once_and_only_when_its_kind_is_asked_for(install_plugin) -> None:
    site = install_plugin("stranger", {"teacher.mine": COUNTING + plugin_of(TeacherSpec)})
    log = site / "stranger_teacher_mine.log"
    registry = load_registry(GOOD)
    assert not registry.losses
    registry.get(SamplerSpec, "hf")
    assert not log.exists()
    for _ in range(2):
        registry.get(TeacherSpec, "mine")
        registry.all(TeacherSpec)
        assert log.read_text() == "imported "


def test_a_sampler_is_found_without_importing_losses() -> None:
    code = (
        "import sys\nfrom dpkd.api import SamplerSpec\nfrom dpkd.plugins import load_registry\n"
        "load_registry({}).get(SamplerSpec, 'hf')\nprint([m for m in sys.modules if m.startswith('dpkd_zoo')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_what_a_plugin_prints_does_not_reach_stdout(install_plugin, capsys, loss_source: Callable[[str], str]) -> None:
    source = loss_source("curved").replace("def dpkd_losses():", "def dpkd_losses():\n    print('called')")
    install_plugin("stranger", {"curved": "print('imported')\n" + source})
    assert list(load_registry(GOOD).losses) == ["curved"]
    assert capsys.readouterr() == ("", "imported\ncalled\n")


def test_a_real_interrupt_is_no_broken_plugin(install_plugin) -> None:
    before = signal.getsignal(signal.SIGINT)
    install_plugin("stranger", {"slow": "import signal; signal.raise_signal(signal.SIGINT)"})
    registry = load_registry(GOOD)
    with pytest.raises(KeyboardInterrupt):
        registry.all(LossSpec)
    assert registry.broken == []
    assert signal.getsignal(signal.SIGINT) is before


def test_a_prefix_that_the_plugin_does_not_keep_is_said(install_plugin, loss_source: Callable[[str], str]) -> None:
    install_plugin("stranger", {"sampler.curved": loss_source("curved")})
    registry = load_registry(GOOD)
    assert list(registry.all(SamplerSpec)) == ["hf", "vllm", "vllm-server"]
    (broken,) = registry.broken
    assert "implements no hook: expected a function `dpkd_samplers`" in broken.reason


@pytest.mark.parametrize("spec", [TeacherSpec, SourceSpec])
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("'mine'", "'My own'"), "the name 'My own' should be lower-case"),
        (("'x', open=print", "'x', open=print, **dict(config=dict)"), "the config of 'mine' must be a subclass"),
        (("open=print", "open=3"), "`open` of 'mine' must be callable, but is int"),
    ],
)
def test_a_teacher_or_source_that_does_not_hold(spec: type, change: tuple[str, str], reason: str, install_plugin):
    source = plugin_of(spec).replace(*change)
    if "dict(config" in source:
        source = source.replace(", config=SourceConfig", "")
    install_plugin("stranger", {"x": source})
    registry = load_registry(GOOD)
    assert "mine" not in registry.all(spec)
    (broken,) = registry.broken
    assert reason in broken.reason
