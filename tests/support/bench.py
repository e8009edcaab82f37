"""What the benchmarks' tests share: their command line, small and on one thread."""

from __future__ import annotations

from typer.testing import CliRunner, Result

from benchmarks.__main__ import app


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, [*arguments, "--quick", "--threads", "1"])
