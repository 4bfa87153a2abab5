"""The hooks that a plugin may implement, and how an argument of one goes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

import pluggy

from dpkd.api import LossSpec, MetricSpec, SamplerSpec

HookT = TypeVar("HookT", bound=Callable[..., Any])
hookspec = pluggy.HookspecMarker("dpkd")


class PluginDeprecation(FutureWarning):
    """A plugin takes an argument that will go. Shown by default: who runs the plugin can tell who wrote it."""


class Deprecated(NamedTuple):
    """An argument that goes: deprecated since a version, gone in another, and what a plugin does instead."""

    since: str
    gone_in: str
    instead: str


# Hook -> argument -> how it goes. The argument stays in the hook below, with its value, until the version it goes in.
DEPRECATED_ARGUMENTS: Mapping[str, Mapping[str, Deprecated]] = {}


def hook(
    function: HookT | None = None, *, deprecated: Mapping[str, Mapping[str, Deprecated]] = DEPRECATED_ARGUMENTS
) -> Any:
    """Marks a hook. A plugin that takes a deprecated argument of it causes a warning at its own file and line.

    Raises ValueError when the table names an argument that the hook does not have.
    """

    def marked(function: HookT) -> HookT:
        arguments = deprecated.get(function.__name__, {})
        if strange := arguments.keys() - inspect.signature(function).parameters.keys():
            raise ValueError(f"{function.__name__} has no argument {', '.join(sorted(strange))} to deprecate")
        warnings = {
            argument: PluginDeprecation(
                f"{function.__name__}: the argument `{argument}` is deprecated since dpkd {how.since} and goes in "
                f"{how.gone_in}. {how.instead}"
            )
            for argument, how in arguments.items()
        }
        return hookspec(function, warn_on_impl_args=dict[str, Warning](warnings))

    return marked if function is None else marked(function)


class DpkdHooks:
    """One method per hook."""

    @hook
    def dpkd_losses(self) -> Iterable[LossSpec]:  # type: ignore[empty-body]
        """The losses of this plugin.

        Example:

            @hookimpl
            def dpkd_losses():
                return [SPEC]
        """

    @hook
    def dpkd_metrics(self) -> Iterable[MetricSpec]:  # type: ignore[empty-body]
        """The metrics of this plugin, which `dpkd eval` takes of a model's answers.

        Example:

            @hookimpl
            def dpkd_metrics():
                return [MetricSpec("letters", "letters", "", "Length.", per_row=lambda a: map(len, a.predictions))]
        """

    @hookspec
    def dpkd_samplers(self) -> Iterable[SamplerSpec]:  # type: ignore[empty-body]
        """The ways of this plugin to write responses, which `text.backend` names.

        Example:

            @hookimpl
            def dpkd_samplers():
                return [SamplerSpec("echo", "Repeats the prompt.", open=Echo)]
        """

    @hookspec
    def dpkd_response_sources(self) -> Iterable[Any]:  # type: ignore[empty-body]
        """The response sources of this plugin, which `text.source` names.

        Example:

            @hookimpl
            def dpkd_response_sources():
                return [SourceSpec("best-of-n", "The best of n responses.", BestOfN, BestOfNConfig)]
        """
