"""The registry: finds plugins behind entry points, isolates the broken, refuses the ambiguous, suggests names.

Built-in plugins and a stranger's come in by the same door: an entry point of group `dpkd`. A plugin that fails is
listed with its reason and never stops the tool. A registry is made once by the command line or by `dpkd.python` and
passed to what needs it; it imports plugins of a kind when that kind is first asked for, and each plugin once.
"""

from __future__ import annotations

import difflib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import Distribution, EntryPoint, entry_points
from typing import Any, Generic, TypeAlias

import pluggy

from dpkd.api import LossSpec
from dpkd.errors import DpkdError, SettingsError, described
from dpkd.hookspecs import KINDS, DpkdHooks, Kind, PluginError, SpecT, kind_of

GROUP = "dpkd"
VARIABLE = "DPKD_PLUGINS"
LOSSES = kind_of(LossSpec)


@dataclass(frozen=True)
class Registered(Generic[SpecT]):
    """A spec and where it comes from."""

    spec: SpecT
    distribution: str
    version: str
    entry_point: str
    file: str

    @property
    def origin(self) -> str:
        """Distribution, version and file, for messages."""
        return f"{self.distribution} {self.version} ({self.file})"


RegisteredLoss: TypeAlias = Registered[LossSpec]


@dataclass(frozen=True)
class BrokenPlugin:
    """A plugin that could not be used, and why."""

    entry_point: str
    distribution: str
    reason: str


class Registry:
    """The plugins of every kind, by the class of their spec: `registry.get(LossSpec, "jsd").spec`."""

    def __init__(
        self,
        points: Sequence[EntryPoint] = (),
        *,
        restricted: str | None = None,
        unmatched: Sequence[str] = (),
        hooks: type = DpkdHooks,
    ) -> None:
        """`restricted` is the value of DPKD_PLUGINS, and `unmatched` the names in it that no plugin has."""
        self.restricted, self.unmatched = restricted, tuple(unmatched)
        self._points = tuple(points)
        self._manager = pluggy.PluginManager(GROUP)
        self._manager.add_hookspecs(hooks)
        self._plugins: dict[str, Any] = {}  # None: could not be imported
        self._asked: set[tuple[str, str]] = set()
        self._claims: dict[type, dict[str, list[Registered[Any]]]] = {kind.spec: {} for kind in KINDS}
        self._broken: list[BrokenPlugin] = []

    @property
    def broken(self) -> list[BrokenPlugin]:
        """The plugins that could not be used, among those that were asked for something."""
        return sorted(self._broken, key=lambda b: (b.entry_point, b.distribution))

    @property
    def losses(self) -> dict[str, RegisteredLoss]:
        """All losses, by name."""
        return self.all(LossSpec)

    def all(self, spec: type[SpecT]) -> dict[str, Registered[SpecT]]:
        """All plugins of a kind, by name in alphabetical order, without names that two plugins claim."""
        self._ask(kind_of(spec), self._points)
        claims = self._claims[spec]
        return {name: claims[name][0] for name in sorted(claims) if len(claims[name]) == 1}

    def get(self, spec: type[SpecT], name: str) -> Registered[SpecT]:
        """The plugin of a kind and name.

        Only entry points of that kind, or of that name, are loaded, and the others where these do not have it.
        Raises DpkdError when two plugins claim the name, or when there is none: with the nearest right names.
        """
        kind, claims = kind_of(spec), self._claims[spec]
        self._ask(kind, [p for p in self._points if _declared(p) is kind or p.name == name])
        if name not in claims:
            self._ask(kind, self._points)
        if name not in claims:
            raise SettingsError([self._unknown(kind, name)])
        if len(claims[name]) > 1:
            raise DpkdError(_conflict(kind, name, claims[name]))
        return claims[name][0]

    def add(self, registered: Registered[Any]) -> None:
        """Add a spec without an entry point, for this registry alone."""
        self._claims[type(registered.spec)].setdefault(registered.spec.name, []).append(registered)

    def conflicts(self, spec: type[SpecT]) -> dict[str, tuple[list[Registered[SpecT]], str]]:
        """Names that several plugins of a kind claim: the plugins, and a sentence about them."""
        self.all(spec)
        claims = self._claims[spec]
        twice = {name: claims[name] for name in sorted(claims) if len(claims[name]) > 1}
        return {name: (found, _conflict(kind_of(spec), name, found)) for name, found in twice.items()}

    def check_conflicts(self, spec: type[SpecT]) -> None:
        """Raises DpkdError when any name of a kind is claimed twice."""
        if found := self.conflicts(spec):
            raise DpkdError("\n".join(message for _, message in found.values()))

    def restriction(self) -> str:
        """What DPKD_PLUGINS does, and which of its names match no plugin."""
        text = f"{VARIABLE}={self.restricted!r} restricts the plugins"
        return f"{text}, and matches no plugin by {', '.join(self.unmatched)}" if self.unmatched else text

    def _ask(self, kind: Kind[Any], points: Iterable[EntryPoint]) -> None:
        """Load what plugins have of a kind; each is asked once."""
        for point in points:
            if (kind.hook, _unique(point)) in self._asked or _declared(point) not in (kind, LOSSES):
                continue
            self._asked.add((kind.hook, _unique(point)))
            try:
                with _isolated():
                    plugin = self._plugin(point)
                    specs = [] if plugin is None else self._specs(kind, point, plugin)
            except PluginError as error:
                self._broken.append(BrokenPlugin(point.name, _distribution(point)[0], str(error)))
                continue
            file = getattr(plugin, "__file__", None) or point.value
            for spec in specs:
                self.add(Registered(spec, *_distribution(point), point.name, str(file)))

    def _plugin(self, point: EntryPoint) -> Any:
        """The plugin behind an entry point; it is imported once, and None from the second call on where that failed."""
        unique = _unique(point)
        if unique not in self._plugins:
            self._plugins[unique] = None
            plugin = point.load()
            _check_hook_names(self._manager, plugin)
            self._manager.register(plugin, name=unique)
            if not self._manager.get_hookcallers(plugin):
                raise PluginError(_without_hook(point))
            self._plugins[unique] = plugin
        return self._plugins[unique]

    def _specs(self, kind: Kind[SpecT], point: EntryPoint, plugin: Any) -> list[SpecT]:
        """What the hook of a kind returns, checked; nothing where the plugin does not have it."""
        if kind.hook not in [caller.name for caller in self._manager.get_hookcallers(plugin) or []]:
            if point.name.startswith(kind.prefix):
                raise PluginError(_without_hook(point))
            return []
        others = [other for name, other in self._manager.list_name_plugin() if name != _unique(point)]
        results = self._manager.subset_hook_caller(kind.hook, remove_plugins=others)()
        return [_checked(kind, spec) for result in results or [None] for spec in _listed(kind, result)]

    def _unknown(self, kind: Kind[Any], name: str) -> str:
        """What to say of a name that no plugin has."""
        names = sorted(self._claims[kind.spec])
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
        parts = [f"no {kind.name} is called {name!r}"]
        if near:
            parts.append(f"did you mean {' or '.join(near)}?")
        elif names:
            parts.append(f"there are: {', '.join(names)}")
        if self.restricted is not None:
            parts.append(self.restriction())
        likely = {name, *difflib.get_close_matches(name, [b.entry_point for b in self.broken], n=1, cutoff=0.7)}
        own = [b for b in self.broken if b.entry_point.removeprefix(kind.prefix) in likely]
        parts += [f"the plugin {b.entry_point} ({b.distribution}) failed to load: {b.reason}" for b in own]
        if self.broken and not own:
            broken = ", ".join(f"{b.entry_point} ({b.distribution})" for b in self.broken)
            parts.append(f"these plugins failed to load: {broken}; see `dpkd list-losses --broken`")
        return "; ".join(parts)


def load_registry(environment: Mapping[str, str] | None = None, *, hooks: type = DpkdHooks) -> Registry:
    """A registry of the installed plugins that DPKD_PLUGINS allows; nothing is imported yet."""
    restricted = (os.environ if environment is None else environment).get(VARIABLE)
    points = {(p.name, p.value, _distribution(p)): p for p in entry_points(group=GROUP)}
    allowed, unmatched = _allowed([points[key] for key in sorted(points)], restricted)
    return Registry(allowed, restricted=restricted, unmatched=unmatched, hooks=hooks)


def _allowed(points: list[EntryPoint], restricted: str | None) -> tuple[list[EntryPoint], list[str]]:
    """The plugins that DPKD_PLUGINS allows, and the names in it that match none.

    dpkd's own metrics, samplers, teachers and sources are always allowed: no run can do without them.
    """
    if restricted is None:
        return points, []
    wanted = {_normal(name): name.strip() for name in restricted.split(",") if name.strip()}
    unmatched = [name for key, name in wanted.items() if not any(key in _names(p) for p in points)]
    return [p for p in points if _names(p) & wanted.keys() or _is_needed(p)], unmatched


def _is_needed(point: EntryPoint) -> bool:
    return _distribution(point)[0] == "dpkd" and _declared(point) is not LOSSES


def _names(point: EntryPoint) -> set[str]:
    """What DPKD_PLUGINS may call a plugin: its entry point, or its distribution."""
    return {_normal(point.name), _normal(_distribution(point)[0])}


def _normal(name: str) -> str:
    return name.strip().lower().replace("_", "-")


def _declared(point: EntryPoint) -> Kind[Any]:
    """The kind that an entry point's prefix declares; without one it is taken for a loss, and may have other hooks."""
    return next((kind for kind in KINDS if point.name.startswith(kind.prefix)), LOSSES)


def _distribution(point: EntryPoint) -> tuple[str, str]:
    return _name_and_version(point.dist) if point.dist is not None else ("unknown distribution", "?")


@lru_cache(maxsize=256)  # each call reads and parses a file, and a registry asks thousands of times
def _name_and_version(distribution: Distribution) -> tuple[str, str]:
    return distribution.name, distribution.version


def _unique(point: EntryPoint) -> str:
    return f"{_distribution(point)[0]}:{point.name}"


def _without_hook(point: EntryPoint) -> str:
    hook = _declared(point).hook
    return f"{point.value} implements no hook: expected a function `{hook}` with the decorator @hookimpl from dpkd.api"


def _conflict(kind: Kind[Any], name: str, found: Sequence[Registered[Any]]) -> str:
    """Who claims a name."""
    found = sorted(found, key=lambda one: one.origin)
    claims = " and ".join(one.origin for one in found)
    return (
        f"two {kind.plural} are called {name!r}: {claims}. Uninstall one, or name the plugins to load, separated by "
        f"commas: {VARIABLE}={found[0].distribution}"
    )


def _check_hook_names(manager: pluggy.PluginManager, plugin: Any) -> None:
    """pluggy accepts a hook of any name; a misspelt one would never be called."""
    known = {name for name, caller in vars(manager.hook).items() if caller.has_spec()}
    for name in dir(plugin):
        if manager.parse_hookimpl_opts(plugin, name) is not None and name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise PluginError(f"there is no hook {name!r}{hint} (hooks: {', '.join(sorted(known))})")


def _listed(kind: Kind[Any], result: Any) -> Iterable[Any]:
    if isinstance(result, tuple(k.spec for k in KINDS)) or not isinstance(result, Iterable):
        found = "None" if result is None else type(result).__name__  # pluggy leaves out a hook's None
        raise PluginError(f"{kind.hook} must return a list of {kind.spec.__name__}, but returned {found}")
    return result


def _checked(kind: Kind[SpecT], spec: Any) -> SpecT:
    if not isinstance(spec, kind.spec):
        raise PluginError(f"{kind.hook} must return {kind.spec.__name__}s, but the list holds {type(spec).__name__}")
    kind.check(spec)
    return spec


@contextmanager
def _isolated() -> Iterator[None]:
    """Run a plugin's code: what it prints goes to stderr, and whatever it raises becomes a PluginError.

    That holds for KeyboardInterrupt too, unless somebody really pressed Ctrl-C.
    """
    with redirect_stdout(sys.stderr), _interrupts() as interrupts:
        try:
            yield
        except PluginError:
            raise
        except BaseException as error:
            if interrupts:
                raise
            raise PluginError(described(error)) from error


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """The interrupts that arrive meanwhile; the handler in place is still called."""
    arrived: list[int] = []
    before = signal.getsignal(signal.SIGINT)
    if not callable(before) or threading.current_thread() is not threading.main_thread():
        yield arrived
        return
    handler: Callable[[int, Any], Any] = before

    def note(number: int, frame: Any) -> None:
        arrived.append(number)
        handler(number, frame)

    signal.signal(signal.SIGINT, note)
    try:
        yield arrived
    finally:
        signal.signal(signal.SIGINT, before)
