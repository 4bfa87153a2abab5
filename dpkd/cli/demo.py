"""`dpkd demo`."""

from __future__ import annotations

from typing import Annotated

import typer


def demo(
    loss: Annotated[str, typer.Option(help="objective, see `dpkd list-losses`")] = "kd",
    steps: Annotated[
        int | None, typer.Option(help="optimizer steps [default: fits the time of the demo]", min=1, show_default=False)
    ] = None,
    output: Annotated[
        str | None, typer.Option(help="run folder [default: runs/demo-LOSS-N]", show_default=False)
    ] = None,
) -> None:
    """Distil a real pretrained teacher into a smaller student, here and now: no hub, no GPU, about ten minutes."""
    from dpkd.demo.run import run_demo

    run_demo(loss, steps=steps, output=output)
