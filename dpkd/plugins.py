"""The plugin host: finds losses behind entry points, isolates the broken, refuses the ambiguous, suggests names.

Built-in losses and a stranger's come in by the same door: an entry point of group `dpkd`. A plugin that fails is
listed with its reason and never stops the tool. Nothing is kept between calls.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType
from typing import Any, TypeVar

import pluggy

from dpkd.api import LossSpec, MetricSpec, SamplerSpec
from dpkd.errors import DpkdError
from dpkd.hookspecs import DpkdHooks
from dpkd.specs import PluginError, checked_loss, checked_metric, checked_sampler, checked_source

GROUP = "dpkd"
METRICS_GROUP = "dpkd.metrics"
SAMPLERS_GROUP = "dpkd.samplers"
SOURCES_GROUP = "dpkd.sources"
VARIABLE = "DPKD_PLUGINS"

SpecT = TypeVar("SpecT", bound=Any)


@dataclass(frozen=True)
class RegisteredLoss:
    """A loss and where it comes from."""

    spec: LossSpec
    distribution: str
    version: str
    entry_point: str
    file: str

    @property
    def origin(self) -> str:
        """Distribution, version and file, for messages."""
        return f"{self.distribution} {self.version} ({self.file})"


@dataclass(frozen=True)
class BrokenPlugin:
    """A plugin that could not be used, and why."""

    entry_point: str
    distribution: str
    reason: str


@dataclass
class Host:
    """What the installed plugins offer."""

    losses: dict[str, RegisteredLoss] = field(default_factory=dict)
    broken: list[BrokenPlugin] = field(default_factory=list)
    conflicts: dict[str, list[RegisteredLoss]] = field(default_factory=dict)
    restricted: str | None = None  # the value of DPKD_PLUGINS, where it is set
    unmatched: tuple[str, ...] = ()  # names in it that no plugin has

    def get(self, name: str) -> RegisteredLoss:
        """The loss of a name.

        Raises DpkdError when two plugins claim the name, or when there is none: with the nearest right names.
        """
        if name in self.conflicts:
            raise DpkdError(self.conflict(name))
        if name in self.losses:
            return self.losses[name]
        raise DpkdError(self.unknown(name))

    def check_conflicts(self) -> None:
        """Raises DpkdError when any name is claimed twice."""
        if self.conflicts:
            raise DpkdError("\n".join(self.conflict(name) for name in sorted(self.conflicts)))

    def restriction(self) -> str:
        """What DPKD_PLUGINS does, and which of its names are nobody's."""
        text = f"{VARIABLE}={self.restricted!r} restricts the plugins"
        return f"{text}, and names none by {', '.join(self.unmatched)}" if self.unmatched else text

    def conflict(self, name: str) -> str:
        """Who claims a name."""
        claims = " and ".join(loss.origin for loss in self.conflicts[name])
        wanted = ",".join(dict.fromkeys(loss.distribution for loss in self.conflicts[name][:1]))
        return (
            f"two losses are called {name!r}: {claims}. Uninstall one, or name the plugins to load, with commas "
            f"between: {VARIABLE}={wanted}"
        )

    def unknown(self, name: str) -> str:
        """What to say of a name that no plugin has."""
        near = difflib.get_close_matches(name, [*self.losses, *self.conflicts], n=3, cutoff=0.5)
        parts = [f"no loss is called {name!r}"]
        if near:
            parts.append(f"did you mean {' or '.join(near)}?")
        elif self.losses:
            parts.append(f"there are: {', '.join(self.losses)}")
        if self.restricted is not None:
            parts.append(self.restriction())
        likely = {name, *difflib.get_close_matches(name, [b.entry_point for b in self.broken], n=1, cutoff=0.7)}
        own = [b for b in self.broken if b.entry_point in likely]
        parts += [f"the plugin {b.entry_point} ({b.distribution}) failed to load: {b.reason}" for b in own]
        if self.broken and not own:
            names = ", ".join(f"{b.entry_point} ({b.distribution})" for b in self.broken)
            parts.append(f"these plugins failed to load: {names}; see `dpkd list-losses --broken`")
        return "; ".join(parts)


def load_host(environment: Mapping[str, str] | None = None, *, hooks: type = DpkdHooks) -> Host:
    """Load every plugin that DPKD_PLUGINS allows; a plugin that fails is kept as broken, with its reason."""
    restricted = (os.environ if environment is None else environment).get(VARIABLE)
    host = Host(restricted=restricted)
    manager = pluggy.PluginManager(GROUP)
    manager.add_hookspecs(hooks)
    claims: dict[str, list[RegisteredLoss]] = {}
    points, host.unmatched = _allowed(_discover(GROUP), restricted)
    for point in points:
        try:
            for loss in _load(manager, point):
                claims.setdefault(loss.spec.name, []).append(loss)
        # A plugin may fail in any way, even leave the program, and none of them may stop the tool.
        except (Exception, SystemExit) as error:
            host.broken.append(BrokenPlugin(point.name, _distribution(point)[0], _reason(error)))
    for name in sorted(claims):
        if len(claims[name]) == 1:
            host.losses[name] = claims[name][0]
        else:
            host.conflicts[name] = claims[name]
    return host


def _discover(group: str) -> list[EntryPoint]:
    """Entry points of a group, sorted, each once."""
    points = {(p.name, p.value, _distribution(p)): p for p in entry_points(group=group)}
    return [points[key] for key in sorted(points)]


def _allowed(points: list[EntryPoint], restricted: str | None) -> tuple[list[EntryPoint], tuple[str, ...]]:
    """The plugins that DPKD_PLUGINS allows, and the names in it that are nobody's."""
    if restricted is None:
        return points, ()
    wanted = {_normal(name): name.strip() for name in restricted.split(",") if name.strip()}
    unmatched = tuple(name for key, name in wanted.items() if not any(key in _names(p) for p in points))
    return [p for p in points if _names(p) & wanted.keys()], unmatched


def _names(point: EntryPoint) -> set[str]:
    """What DPKD_PLUGINS may call a plugin: its entry point, or its distribution."""
    return {_normal(point.name), _normal(_distribution(point)[0])}


def _normal(name: str) -> str:
    return name.strip().lower().replace("_", "-")


def _distribution(point: EntryPoint) -> tuple[str, str]:
    return (point.dist.name, point.dist.version) if point.dist is not None else ("unknown distribution", "?")


def _load(manager: pluggy.PluginManager, point: EntryPoint) -> list[RegisteredLoss]:
    plugin, specs = _called(manager, point, "dpkd_losses", "LossSpec")
    distribution, version = _distribution(point)
    file = getattr(plugin, "__file__", None) or point.value
    return [RegisteredLoss(checked_loss(spec), distribution, version, point.name, str(file)) for spec in specs]


def _called(manager: pluggy.PluginManager, point: EntryPoint, hook: str, wanted: str) -> tuple[Any, list[Any]]:
    """A plugin, and what its hook returns: a list."""
    plugin = point.load()
    unique = f"{_distribution(point)[0]}:{point.name}"
    _check_hook_names(manager, plugin)
    manager.register(plugin, name=unique)
    names = [caller.name for caller in manager.get_hookcallers(plugin) or []]
    if hook not in names:
        if names and point.group == GROUP:  # a plugin of metrics alone has no losses, and is none the worse for it
            return plugin, []
        raise PluginError(
            f"{point.value} implements no hook: expected a function `{hook}` with the decorator @hookimpl from dpkd.api"
        )
    others = [other for name, other in manager.list_name_plugin() if name != unique]
    results = manager.subset_hook_caller(hook, remove_plugins=others)()
    if not results:  # pluggy leaves out a hook's None
        raise PluginError(f"{hook} must return a list of {wanted}, but returned None")
    return plugin, [spec for result in results for spec in _listed(result, hook, wanted)]


def load_metrics(environment: Mapping[str, str] | None = None) -> tuple[dict[str, MetricSpec], list[BrokenPlugin]]:
    """The metrics of all installed plugins by name, and the plugins that could not be used.

    They stand in a group of their own, which DPKD_PLUGINS does not restrict, or beside losses in the group `dpkd`,
    which it does. Raises DpkdError when two plugins have a metric of one name.
    """
    return _load_beside("dpkd_metrics", METRICS_GROUP, "metrics", "MetricSpec", checked_metric, environment)


def load_samplers(environment: Mapping[str, str] | None = None) -> tuple[dict[str, SamplerSpec], list[BrokenPlugin]]:
    """The samplers of all installed plugins by name, found as metrics are, and the plugins that could not be used.

    Raises DpkdError when two plugins have a sampler of one name.
    """
    return _load_beside("dpkd_samplers", SAMPLERS_GROUP, "samplers", "SamplerSpec", checked_sampler, environment)


def load_sources(environment: Mapping[str, str] | None = None) -> tuple[dict[str, Any], list[BrokenPlugin]]:
    """The response sources of all installed plugins by name, found as metrics are, and those that could not be used.

    Raises DpkdError when two plugins have a source of one name.
    """
    return _load_beside("dpkd_response_sources", SOURCES_GROUP, "sources", "SourceSpec", checked_source, environment)


def find_sampler(name: str) -> SamplerSpec:
    """The sampler of a name. Raises DpkdError when there is none, with the nearest right names, or why it is broken."""
    samplers, broken = load_samplers()
    if name in samplers:
        return samplers[name]
    near = difflib.get_close_matches(name, samplers, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are: {', '.join(samplers) or 'none'}"
    failed = [f"; the plugin {b.entry_point} ({b.distribution}) failed to load: {b.reason}" for b in broken]
    raise DpkdError(f"no sampler is called {name!r}; {hint}{''.join(failed)}")


def _load_beside(
    hook: str,
    group: str,
    plural: str,
    wanted: str,
    checked: Callable[[Any], SpecT],
    environment: Mapping[str, str] | None,
) -> tuple[dict[str, SpecT], list[BrokenPlugin]]:
    """What plugins have beside losses: from a group of its own, and from those of the group of losses that have it."""
    manager = pluggy.PluginManager(GROUP)
    manager.add_hookspecs(DpkdHooks)
    found: dict[str, SpecT] = {}
    owners: dict[str, str] = {}
    broken = []
    restricted = (os.environ if environment is None else environment).get(VARIABLE)
    own: list[EntryPoint] = _discover(group)
    known = {point.value for point in own}
    allowed, _ = _allowed(_discover(GROUP), restricted)
    for point in (*own, *(p for p in allowed if p.value not in known and _has(manager, p, hook))):
        owner = f"{point.value} ({_distribution(point)[0]})"
        try:
            specs = [checked(spec) for spec in _called(manager, point, hook, wanted)[1]]
        except (Exception, SystemExit) as error:
            broken.append(BrokenPlugin(point.name, _distribution(point)[0], _reason(error)))
            continue
        for spec in specs:
            name = spec.name
            if name in found:
                raise DpkdError(f"two {plural} are called {name!r}: {owners[name]} and {owner}. Uninstall one.")
            found[name], owners[name] = spec, owner
    return found, broken


def _has(manager: pluggy.PluginManager, point: EntryPoint, hook: str) -> bool:
    """Whether a plugin of the group of losses has a hook too; one that cannot be loaded is a matter of `load_host`."""
    try:
        return manager.parse_hookimpl_opts(point.load(), hook) is not None
    except (Exception, SystemExit):
        return False


def _check_hook_names(manager: pluggy.PluginManager, plugin: ModuleType | Any) -> None:
    """pluggy accepts a hook of any name; a misspelt one would never be called."""
    known = {name for name, caller in vars(manager.hook).items() if caller.has_spec()}
    for name in dir(plugin):
        if manager.parse_hookimpl_opts(plugin, name) is not None and name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise PluginError(f"there is no hook {name!r}{hint} (hooks: {', '.join(sorted(known))})")


def _listed(result: Any, hook: str, wanted: str) -> Iterable[Any]:
    if isinstance(result, LossSpec | MetricSpec | SamplerSpec) or not isinstance(result, Iterable):
        raise PluginError(f"{hook} must return a list of {wanted}, but returned {type(result).__name__}")
    return result


def _reason(error: BaseException) -> str:
    if isinstance(error, PluginError):
        return str(error)
    return f"{type(error).__name__}: {error}"
