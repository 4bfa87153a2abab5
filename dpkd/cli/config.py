"""`dpkd config show` and `dpkd config schema`."""

from __future__ import annotations

import json

import typer

from dpkd.cli.options import Config, Data, LossName, Output, Seed, Set, Student, Teacher, resolved, run_flags

config_app = typer.Typer(help="Show settings, and where each came from.", no_args_is_help=True, rich_markup_mode=None)


@config_app.command()
def show(
    loss: LossName = None,
    teacher: Teacher = None,
    student: Student = None,
    data: Data = None,
    output: Output = None,
    config: Config = None,
    set_: Set = None,
    seed: Seed = None,
) -> None:
    """Print the settings that `dpkd train` would use with these flags."""
    from dpkd.config.write import annotated_yaml

    flags = run_flags(loss=loss, teacher=teacher, student=student, data=data, output=output, seed=seed)
    typer.echo(annotated_yaml(resolved(config=config, assignments=set_, flags=flags)), nl=False)


@config_app.command()
def schema(loss: LossName = None) -> None:
    """Print the JSON schema of all settings, with those of one loss."""
    from dpkd.api import LossSpec
    from dpkd.config.write import schema as make_schema
    from dpkd.plugins import load_registry

    registry = load_registry()
    registered = registry.get(LossSpec, loss) if loss else None
    typer.echo(json.dumps(make_schema(registry, registered), indent=2))
