"""`dpkd ...` in this process, for tests that read what it prints."""

from __future__ import annotations

from typer.testing import CliRunner

from dpkd.cli.main import app


def printed(*arguments: object, columns: int = 160, exit_code: int = 0) -> str:
    """What a command prints; the errors that it raises are raised here, too."""
    result = CliRunner().invoke(app, [*map(str, arguments)], env={"COLUMNS": str(columns)})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == exit_code, result.output
    return result.stdout
