"""Create the environments of the table one after the other, run their checks, delete them, and write the table.

    python3 -m tests.matrix                       all rows
    python3 -m tests.matrix 3.11-2.13 3.12        some of them; the others keep their lines

Interpreters are searched as python3.X on the path and under pyenv; PYTHON310=COMMAND names one. The output of pip and
pytest goes to build/matrix/ROW.log. Exit status 1 if a row failed.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from datetime import date
from pathlib import Path

from tests.matrix import checks, table
from tests.matrix.environment import DoesNotInstall, Environment, find_python, processor
from tests.matrix.rows import ROWS, Row, chosen

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "matrix.md"
LOGS = ROOT / "build" / "matrix"


def try_row(row: Row, root: Path, logs: Path, environ: Mapping[str, str]) -> checks.Outcome:
    """Create the environment of a row, run every check in it, and delete it."""
    outcome, started = checks.Outcome(), time.monotonic()
    logs.mkdir(parents=True, exist_ok=True)
    log = logs / f"{row.name}.log"
    log.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix="carve-matrix-") as folder:
        environment = Environment(Path(folder), log, environ)
        try:
            environment.install(row, root, find_python(row.python, environ))
            outcome.versions = environment.versions("torch", "transformers", "triton")
            outcome.versions["python"] = row.python
        except DoesNotInstall as refused:
            print(f"  does not install: {refused}", flush=True)
            if row.known is None:
                outcome.faults.append(f"does not install: {refused}")
            outcome.known = row.known
        else:
            print("  " + ", ".join(f"{name} {found}" for name, found in outcome.versions.items()), flush=True)
            checks.try_all(environment, outcome)
    outcome.seconds = time.monotonic() - started
    return outcome


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", help=f"some of {' '.join(row.name for row in ROWS)}")
    try:
        rows = chosen(parser.parse_args().rows)
    except ValueError as error:
        parser.error(str(error))
    failed = []
    for row in rows:
        print(f"{row.name}: Python {row.python}", flush=True)
        outcome = try_row(row, ROOT, LOGS, os.environ)
        print(f"  {outcome.result} ({outcome.seconds:.0f} s)", flush=True)
        if outcome.faults:
            print(f"  the whole output: {LOGS / row.name}.log", flush=True)
            failed.append(row.name)
        page = PAGE.read_text(encoding="utf-8")
        written = table.replaced(page, {row.name: table.line(row, outcome, date.today())}, processor())
        PAGE.write_text(written, encoding="utf-8")
    print(*table.table(table.lines_of(PAGE.read_text(encoding="utf-8"))), sep="\n")
    print(f"{len(rows) - len(failed)} of {len(rows)} rows passed; failed: {' '.join(failed) or 'none'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
