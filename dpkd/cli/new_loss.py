"""`dpkd new-loss`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def new_loss(
    name: Annotated[str, typer.Argument(help="name of the loss, for --loss")],
    kind: Annotated[
        str, typer.Option(help="what it works on: token (logits), pair (two responses) or rollout (policy gradients)")
    ] = "token",
    output: Annotated[
        Path | None, typer.Option(help="folder to write [default: ./dpkd-NAME]", show_default=False)
    ] = None,
) -> None:
    """Write a package for a loss of your own: module, test, pyproject and README, which work as they are."""
    from dpkd.api import LossSpec
    from dpkd.plugins import load_registry
    from dpkd.scaffold import names_of, write_package

    registry = load_registry()
    taken = {loss: registered.origin for loss, registered in registry.losses.items()}
    conflicts = registry.conflicts(LossSpec)
    taken |= {loss: " and ".join(c.origin for c in claims) for loss, (claims, _) in conflicts.items()}
    names = names_of(name, taken)
    folder = output if output is not None else Path(names.package)
    for path in write_package(names, kind, folder):
        typer.echo(path)
    typer.echo(
        f"\nThe package works as written. Next:\n  cd {folder}\n  pip install --editable .\n  dpkd check-loss {name}\n"
        "  pytest\n"
        f"then write your own formula into {names.test}.py and {names.module}.py (README.md says in which order)"
    )
