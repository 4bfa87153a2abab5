"""The hooks that a plugin may implement."""

from __future__ import annotations

from collections.abc import Iterable

import pluggy

from dpkd.api import LossSpec

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
