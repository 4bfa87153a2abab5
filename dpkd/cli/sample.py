"""`dpkd sample`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dpkd.cli.options import SetData, TrustRemoteCode, data_settings

if TYPE_CHECKING:
    from dpkd.models.settings import TeacherSettings
    from dpkd.rollout.sample_file import SampleReport


def sample(
    model: Annotated[str, typer.Option(help="what generates: hub id, model folder, run folder or server address")],
    output: Annotated[Path, typer.Option(help="JSONL file to write; rerun to resume an interrupted call")],
    data: Annotated[str, typer.Option(help="prompts: a file or hub id")] = "databricks/databricks-dolly-15k",
    set_: SetData = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy", min=0.0)] = 1.0,
    top_p: Annotated[float, typer.Option(help="nucleus", min=0.0, max=1.0)] = 1.0,
    top_k: Annotated[int, typer.Option(help="0: all tokens", min=0)] = 0,
    max_new_tokens: Annotated[int, typer.Option(help="length limit", min=1)] = 256,
    samples: Annotated[int, typer.Option(help="responses per prompt", min=1)] = 1,
    batch_size: Annotated[int, typer.Option(help="responses written together", min=1)] = 32,
    limit: Annotated[int | None, typer.Option(help="only the first rows", min=1, show_default=False)] = None,
    backend: Annotated[str, typer.Option(help="sampler: hf, vllm or another installed one")] = "hf",
    seed: Annotated[int, typer.Option(help="seed of the sampling", min=0)] = 10,
    tokenizer: Annotated[
        str | None, typer.Option(help="with a server: hub id or folder of its tokenizer", show_default=False)
    ] = None,
    protocol: Annotated[str, typer.Option(help="with a server: vllm, sglang or openai")] = "vllm",
    served_name: Annotated[
        str | None, typer.Option(help="with a server of several models: the model's name there", show_default=False)
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Write a model's responses to a file: the data of sequence-level distillation."""
    from rich.console import Console

    from dpkd.api import SamplerSpec, SamplingSettings
    from dpkd.cli.progress import shown
    from dpkd.config.problems import checked
    from dpkd.errors import SettingsError
    from dpkd.evaluation.target import model_of
    from dpkd.models.settings import is_address
    from dpkd.plugins import load_registry
    from dpkd.rollout.generator import refusals
    from dpkd.rollout.sample_file import sample_to_file

    prompts = data_settings({"path": data, "limit": limit}, set_)
    how = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "max_new_tokens": max_new_tokens}
    sampling = checked(SamplingSettings, {**how, "batch_size": batch_size}, "sampling")
    registry = load_registry()
    if problems := refusals(registry.get(SamplerSpec, backend).spec, {}):
        raise SettingsError([f"--backend: {problem}" for problem in problems])
    source = (
        _served(model, served_name, protocol, tokenizer)
        if is_address(model)
        else model_of(model, trust_remote_code=trust_remote_code)
    )
    with shown(Console(stderr=True)) as progress:
        report = sample_to_file(
            source,
            prompts,
            sampling,
            registry=registry,
            output=output,
            seed=seed,
            num_generations=samples,
            backend=backend,
            progress=lambda done, of: progress("responses", done, of),
        )
    _print(report, output)


def _served(model: str, name: str | None, protocol: str, tokenizer: str | None) -> TeacherSettings:
    """The model of a server. Raises SettingsError where nothing says what its tokenizer is."""
    from dpkd.config.problems import checked
    from dpkd.errors import SettingsError
    from dpkd.models.settings import TeacherSettings

    served = {"server": model, "model": name, "protocol": protocol, "tokenizer": tokenizer or name}
    if served["tokenizer"] is None:
        raise SettingsError(["--tokenizer: is missing; a server's tokenizer is named by its hub id or folder"])
    return checked(TeacherSettings, served, "teacher")


def _print(report: SampleReport, output: Path) -> None:
    for note in report.notes:
        typer.echo(note)
    found = f", {report.found} were there" if report.found else ""
    typer.echo(
        f"{output}: {report.written} response{'s' * (report.written != 1)} written{found}; "
        f"{report.truncated} reached the length limit, {report.empty} empty"
    )
    skip = " --set data.on_bad_row=skip" if report.empty else ""
    typer.echo(f"train on it: dpkd train --loss sft --data {output} --student ...{skip}")
