"""The host on plugins that are found as installed ones are: through `.dist-info` folders on the path."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from dpkd.errors import DpkdError
from dpkd.plugins import Host, load_host

GOOD = {"DPKD_PLUGINS": "stranger"}


def broken_reason(host: Host) -> str:
    (only,) = host.broken
    assert not host.losses
    return only.reason


def test_a_good_plugin_is_registered_with_its_origin(install_plugin, loss_source: Callable[[str], str]) -> None:
    site = install_plugin("stranger", {"curved": loss_source("curved")}, version="2.1")
    loss = load_host(GOOD).get("curved")
    assert (loss.distribution, loss.version, loss.entry_point) == ("stranger", "2.1", "curved")
    assert Path(loss.file) == site / "stranger_curved.py"
    assert loss.spec.name == "curved"


def test_built_in_losses_come_in_by_the_same_door(install_plugin, loss_source: Callable[[str], str]) -> None:
    install_plugin("stranger", {"curved": loss_source("curved")})
    host = load_host({})
    assert host.losses["kd"].distribution == "dpkd"
    assert host.losses["curved"].distribution == "stranger"
    assert list(host.losses) == sorted(host.losses)


def test_one_broken_plugin_never_stops_the_others(install_plugin, loss_source: Callable[[str], str]) -> None:
    install_plugin("stranger", {"aaa": "1 / 0", "curved": loss_source("curved"), "zzz": "import nowhere_at_all"})
    host = load_host(GOOD)
    assert list(host.losses) == ["curved"]
    assert [(b.entry_point, b.distribution) for b in host.broken] == [("aaa", "stranger"), ("zzz", "stranger")]
    assert [b.reason for b in host.broken] == [
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
    assert reason in broken_reason(load_host(GOOD))


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
    assert reason in broken_reason(load_host(GOOD))


def test_two_losses_of_one_name_are_an_error_that_names_both(install_plugin, loss_source: Callable[[str], str]) -> None:
    install_plugin("stranger", {"curved": loss_source("curved"), "other": loss_source("other")})
    site = install_plugin("guest", {"curved": loss_source("curved")}, version="3.0")
    host = load_host({"DPKD_PLUGINS": "stranger,guest"})
    with pytest.raises(DpkdError) as caught:
        host.get("curved")
    message = str(caught.value)
    assert f"stranger 1.0 ({site / 'stranger_curved.py'})" in message
    assert f"guest 3.0 ({site / 'guest_curved.py'})" in message
    with pytest.raises(DpkdError, match="two losses are called 'curved'"):
        host.check_conflicts()
    assert host.get("other").distribution == "stranger"
    assert load_host({"DPKD_PLUGINS": "guest"}).get("curved").distribution == "guest"


def test_unknown_name_gets_the_nearest_ones_and_what_failed(install_plugin, loss_source: Callable[[str], str]) -> None:
    install_plugin("stranger", {"curved": loss_source("curved"), "flat": "import nowhere_at_all"})
    host = load_host(GOOD)
    with pytest.raises(DpkdError) as caught:
        host.get("curve")
    assert str(caught.value) == (
        "no loss is called 'curve'; did you mean curved?; DPKD_PLUGINS='stranger' restricts the plugins; "
        "these plugins failed to load: flat (stranger); see `dpkd list-losses --broken`"
    )
    with pytest.raises(DpkdError, match=r"the plugin flat \(stranger\) failed to load: ModuleNotFoundError"):
        host.get("flat")
    with pytest.raises(DpkdError, match=r"no loss is called 'flatt'.*the plugin flat \(stranger\) failed to load"):
        host.get("flatt")


def test_a_restriction_that_names_nobody_says_so(install_plugin, loss_source: Callable[[str], str]) -> None:
    install_plugin("stranger", {"curved": loss_source("curved")})
    host = load_host({"DPKD_PLUGINS": "curved, nope"})
    assert host.unmatched == ("nope",)
    with pytest.raises(DpkdError, match="restricts the plugins, and names none by nope"):
        host.get("bent")


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
    host = load_host({"DPKD_PLUGINS": choice})
    assert list(host.losses) == names
    with pytest.raises(DpkdError, match=re.escape(f"DPKD_PLUGINS={choice!r} restricts the plugins")):
        host.get("round")


def test_nothing_is_kept_between_hosts(install_plugin, loss_source: Callable[[str], str]) -> None:
    before = load_host(GOOD)
    install_plugin("stranger", {"curved": loss_source("curved")})
    assert not before.losses
    assert list(load_host(GOOD).losses) == ["curved"]
