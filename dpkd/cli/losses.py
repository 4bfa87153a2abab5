"""`dpkd list-losses`, `dpkd describe-loss` and `dpkd check-loss`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from dpkd.plugins import RegisteredLoss, Registry


def list_losses(
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of a table")] = False,
    broken: Annotated[
        bool, typer.Option("--broken", help="list the plugins that could not be loaded, and why")
    ] = False,
    family: Annotated[
        str | None, typer.Option(help="only one family: token, pair or rollout", show_default=False)
    ] = None,
    offers: Annotated[
        str | None,
        typer.Option(
            help="losses that this teacher access serves: text, token-logps, top-k, chosen-ids, logits, hidden-states",
            show_default=False,
        ),
    ] = None,
) -> None:
    """List the installed losses."""
    from dpkd.api import LossSpec
    from dpkd.plugins import load_registry

    registry = load_registry()
    if broken:
        _print_broken(registry, as_json)
        return
    rows = [row for row in map(_row, registry.losses.values()) if _wanted(row, family, offers)]
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        registry.check_conflicts(LossSpec)
        return
    _print_table(rows)
    if registry.restricted is not None:
        typer.echo(registry.restriction(), err=True)
    if registry.broken:
        typer.echo(f"{len(registry.broken)} plugin(s) could not be loaded: dpkd list-losses --broken", err=True)
    registry.check_conflicts(LossSpec)  # after the others, which are still of use


def _row(loss: RegisteredLoss) -> dict[str, Any]:
    from dpkd.api import Family, TeacherAccess, Text

    spec = loss.spec
    needs = spec.needs()
    text = spec.suggests.get("text", {})
    teacher_writes = text.get("source") == "teacher" or (
        spec.family is Family.PAIR and text.get("pairs", {}).get("chosen", "teacher") == "teacher"
    )
    if needs is TeacherAccess.NONE and teacher_writes:
        needs = TeacherAccess.TEXT
    return {
        "name": spec.name,
        "family": spec.family.value,
        "text": [t.value for t in Text if t in spec.accepts],
        "needs": needs.value,
        "title": spec.card.title,
        "summary": spec.card.summary,
        "paper": spec.card.sources[0].url if spec.card.sources else "",
        "unconfirmed": spec.card.unconfirmed,
        "from": f"{loss.distribution} {loss.version}",
    }


# Names of `--offers`, by what `TeacherAccess` says.
_OFFERS = {
    "text": "text",
    "token log-probs": "token-logps",
    "top-k log-probs": "top-k",
    "log-probs of chosen ids": "chosen-ids",
    "logits": "logits",
    "hidden states": "hidden-states",
}


def _wanted(row: dict[str, Any], family: str | None, offers: str | None) -> bool:
    from dpkd.api import TeacherAccess
    from dpkd.errors import SettingsError

    if family not in (None, "token", "pair", "rollout"):
        raise SettingsError([f"--family {family}: should be token, pair or rollout"])
    access = {name: TeacherAccess(value) for value, name in _OFFERS.items()}
    if offers not in (None, *access):
        raise SettingsError([f"--offers {offers}: should be one of {', '.join(access)}"])
    levels = list(TeacherAccess)  # from least to most
    fits = offers is None or levels.index(TeacherAccess(row["needs"])) <= levels.index(access[offers])
    return fits and (family is None or row["family"] == family)


def _print_table(rows: list[dict[str, Any]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from dpkd.cli.describe import short_link

    console = Console()
    wide = console.width >= 120
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("name", style="bold", no_wrap=True)
    table.add_column("family")
    if wide:
        table.add_column("text by")
    table.add_column("needs", no_wrap=True)
    table.add_column("what it does", ratio=1)
    if wide:
        table.add_column("paper", max_width=20, overflow="fold")
    for row in rows:
        needs = _OFFERS.get(row["needs"], row["needs"])
        text = "anyone" if len(row["text"]) == 3 else ", ".join(row["text"])
        said = row["summary"] if wide else row["title"]
        paper = Text(short_link(row["paper"]).removeprefix("arXiv "), f"link {row['paper']}" if row["paper"] else "")
        if wide:
            table.add_row(row["name"], row["family"], text, needs, said, paper)
        else:
            table.add_row(row["name"], row["family"], needs, said)
    console.print(table)
    if unconfirmed := [row["name"] for row in rows if row["unconfirmed"]]:
        typer.echo(f"not confirmed against the paper (describe-loss says what): {', '.join(unconfirmed)}")
    typer.echo("needs: what the teacher must offer (--offers)")
    typer.echo("dpkd describe-loss NAME shows formula, settings, papers, and when to use it")


def _print_broken(registry: Registry, as_json: bool) -> None:
    from dataclasses import asdict

    from dpkd.hookspecs import KINDS

    rows = [
        {"entry_point": name, "distribution": ", ".join(c.distribution for c in claims), "reason": message}
        for kind in KINDS
        for name, (claims, message) in registry.conflicts(kind.spec).items()
    ]
    rows += [asdict(plugin) for plugin in registry.broken]
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    for row in rows:
        typer.echo(f"{row['entry_point']} ({row['distribution']}): {row['reason']}")
    if not rows:
        typer.echo("every plugin loaded")


def describe_loss(
    name: Annotated[str | None, typer.Argument(help="name of a loss", show_default=False)] = None,
    compare: Annotated[
        tuple[str, str] | None,
        typer.Option(metavar="A B", help="two losses side by side instead, differences marked", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print the card and the JSON schema of the settings")] = False,
) -> None:
    """Explain a loss: formula, when to use it, and every setting."""
    from dpkd.api import LossSpec
    from dpkd.errors import SettingsError
    from dpkd.plugins import load_registry

    if (name is None) == (compare is None):
        raise SettingsError(["name one loss, or two with --compare A B"])
    registry = load_registry()
    if compare is not None:
        _compare(registry, compare, as_json)
        return
    loss = registry.get(LossSpec, str(name))
    if as_json:
        from dataclasses import asdict

        card = {
            **_row(loss),
            **asdict(loss.spec.card),
            "traits": sorted(loss.spec.traits),
            "suggests": dict(loss.spec.suggests),
        }
        typer.echo(
            json.dumps({"card": card, "settings": loss.spec.config.model_json_schema()}, indent=2, ensure_ascii=False)
        )
        return
    from dpkd.cli.describe import print_card

    print_card(loss, _row(loss))


def _compare(registry: Registry, names: tuple[str, str], as_json: bool) -> None:
    from dpkd.api import LossSpec
    from dpkd.cli import compare as comparison

    first, second = (registry.get(LossSpec, name) for name in names)
    rows = comparison.compare(first, _row(first), second, _row(second))
    if as_json:
        typer.echo(json.dumps(comparison.as_json(names, rows), indent=2, ensure_ascii=False))
        return
    comparison.print_comparison(names, rows)


def check_loss(
    name: Annotated[str | None, typer.Argument(help="name of a loss", show_default=False)] = None,
    check_all: Annotated[bool, typer.Option("--all", help="check every installed loss")] = False,
) -> None:
    """Run the conformance checks on a loss: the contract in executable form."""
    from dpkd.api import LossSpec
    from dpkd.errors import SettingsError
    from dpkd.plugins import load_registry
    from dpkd.testing import check_installed
    from dpkd.testing.kit import compiles

    registry = load_registry()
    if (name is None) == (not check_all):
        raise SettingsError(["name one loss, or pass --all"])
    chosen = list(registry.losses.values()) if check_all else [registry.get(LossSpec, str(name))]
    failed = 0
    for loss in chosen:
        report = check_installed(loss.spec)
        failed += not report.ok
        typer.echo(report.table())
        typer.echo(f"torch.compile: {compiles(loss.spec)}")
    if failed:
        typer.secho(f"{failed} of {len(chosen)} losses break the contract", fg=typer.colors.RED, err=True)
        raise typer.Exit(1)
