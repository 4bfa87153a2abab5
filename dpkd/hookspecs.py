"""The hooks that a plugin may implement."""

from __future__ import annotations

from collections.abc import Iterable

import pluggy

from dpkd.api import LossSpec, MetricSpec

__all__ = ["DpkdHooks"]

hookspec = pluggy.HookspecMarker("dpkd")


class DpkdHooks:
    """One method per hook."""

    @hookspec
    def dpkd_losses(self) -> Iterable[LossSpec]:  # type: ignore[empty-body]
        """The losses of this plugin.

        Example:

            @hookimpl
            def dpkd_losses():
                return [SPEC]
        """

    @hookspec
    def dpkd_metrics(self) -> Iterable[MetricSpec]:  # type: ignore[empty-body]
        """The metrics of this plugin, which `dpkd eval` takes of a model's answers.

        Example:

            @hookimpl
            def dpkd_metrics():
                return [MetricSpec("letters", "letters", "", "Length.", per_row=lambda a: map(len, a.predictions))]
        """
