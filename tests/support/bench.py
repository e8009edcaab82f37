"""The command line of the benchmarks, with small shapes and one thread."""

from __future__ import annotations

from typer.testing import CliRunner, Result

from benchmarks.__main__ import app


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, [*arguments, "--quick", "--threads", "1"])
