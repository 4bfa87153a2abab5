"""`dpkd push` and `dpkd export`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

Run = Annotated[Path, typer.Argument(metavar="RUN", help="folder of a finished run")]


class ExportFormat(StrEnum):
    """What a model is exported to."""

    GGUF = "gguf"


class WeightType(StrEnum):
    """Type of the weights in a GGUF file; others are made from these by llama.cpp's `llama-quantize`."""

    F32 = "f32"
    F16 = "f16"
    BF16 = "bf16"
    Q8 = "q8_0"


def push(
    run: Run,
    repository: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="repository; made where it does not exist")],
    private: Annotated[bool, typer.Option("--private", help="make a new repository private")] = False,
    adapter: Annotated[bool, typer.Option("--adapter", help="upload the adapters (LoRA) alone")] = False,
) -> None:
    """Upload a run's model and card to the Hugging Face hub (log in first: hf auth login)."""
    from dpkd.publish import push as upload

    typer.echo(upload(run, repository, private=private, adapter=adapter))


def export(
    run: Run,
    form: Annotated[ExportFormat, typer.Option("--format", help="gguf: one file for llama.cpp, Ollama, LM Studio")],
    type_: Annotated[WeightType, typer.Option("--type", help="type of the weights")] = WeightType.F16,
    output: Annotated[
        Path | None, typer.Option(help="file to write [default: RUN/model-TYPE.gguf]", show_default=False)
    ] = None,
    converter: Annotated[
        Path | None,
        typer.Option(
            help="llama.cpp's convert_hf_to_gguf.py [default: in the folder LLAMA_CPP, or on PATH]", show_default=False
        ),
    ] = None,
) -> None:
    """Write a run's model in another format."""
    from dpkd.publish import export_gguf

    typer.echo(export_gguf(run, output, outtype=type_.value, converter=converter))
