"""A folder of results that many runs fill, one of them at a time: each result is there whole, or not at all."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from carve_kernels.atomic_write import write_whole
from carve_kernels.cli.ours import is_json, refuse_inputs
from carve_kernels.cli.output import TEMPORARY, refuse_taken, results
from carve_kernels.cli.report import FILES, RECORD, is_ours, write_record

TABLE = "results.jsonl"
SUMMARY = "summary.json"
_KIND = "carve_kernels.batch"
_UNFINISHED = f"{TEMPORARY}batch-"
_HALF_WRITTEN = re.compile(rf"\.({re.escape(TABLE)}|{re.escape(SUMMARY)})\.[0-9a-f]{{32}}")


class Store:
    """The folder of `batch`: results/NAME/result.json for each question, and tables of all of them at the end."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._results = folder, folder / "results"
        self._unfinished = folder

    @contextmanager
    def opened(self) -> Iterator[Store]:
        """Make the folder, keep other runs out of it, and take away what a killed run left half written.

        Raises OSError if the folder cannot be made or another run is at work in it. A folder that stays empty goes.
        """
        made = [path for path in (self._results, *self._results.parents) if not path.exists()]
        try:
            self._results.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise type(error)(f"output: cannot write into {self.folder} ({error.strerror}); choose another") from error
        try:
            with _lock(self.folder) as locked:
                for path in self.folder.iterdir() if locked else ():
                    if path.name.startswith(_UNFINISHED) and path.is_dir():
                        shutil.rmtree(path, ignore_errors=True)
                    elif _HALF_WRITTEN.fullmatch(path.name):
                        path.unlink(missing_ok=True)
                # Of this command alone: others may be writing into the same folder.
                try:
                    self._unfinished = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=self.folder))
                except OSError as error:
                    raise type(error)(f"output: cannot write into {self.folder} ({error.strerror})") from error
                try:
                    yield self
                finally:
                    shutil.rmtree(self._unfinished, ignore_errors=True)
        finally:
            with suppress(OSError):
                for path in made:
                    path.rmdir()

    def refuse_twins(self, names: Iterable[str]) -> None:
        """Raise ValueError for two names that are one folder here: Windows and macOS take A and a for the same."""
        swapped = self._unfinished.with_name(self._unfinished.name.swapcase())
        if not swapped.exists():
            return
        first: dict[str, str] = {}
        for name in names:
            other = first.setdefault(name.casefold(), name)
            if other != name:
                raise ValueError(
                    f"input: the ids {other!r} and {name!r} are one folder in {self.folder}, where capitals make no "
                    "difference; change one of them"
                )

    def refuse_inputs(self, names: Iterable[str], inputs: Mapping[str, Iterable[Path]]) -> None:
        """Raise ValueError for an output that is one of the inputs; these are paths by their option."""
        results = (self._results / name / file for name in names for file in FILES)
        refuse_inputs((self.folder / TABLE, self.folder / SUMMARY, *results), inputs)

    def refuse_foreign(self, names: Iterable[str]) -> None:
        """Raise ValueError for a file that is not one of ours where the tables go, or one of these results."""
        refuse_taken((self.folder / TABLE, self.folder / SUMMARY), is_json(_KIND))
        refuse_taken((self._results / name / file for name in names for file in FILES), is_ours)

    def read(self, name: str) -> dict[str, Any] | None:
        """The record of a result, None where there is none or no whole one."""
        try:
            values = json.loads((self._results / name / RECORD).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return None
        return values if isinstance(values, dict) else None

    def has(self, name: str, marks: Mapping[str, str | None], pictures: bool) -> bool:
        """Whether this very question has been answered: its record is there, without an error, and its pictures are.

        A mark of None is one that cannot be known now: an image that is gone takes no answer with it.
        """
        record = self.read(name)
        return (
            record is not None
            and record.get("error", "") is None
            and all(value is None or record.get(key) == value for key, value in marks.items())
            and (not pictures or all((self._results / name / file).is_file() for file in FILES))
        )

    def write(self, name: str, files: Sequence[str], fill: Callable[[Path], None]) -> None:
        """Let `fill` write these files into a folder of its own, then put them under this name all together.

        Raises OSError, and leaves what was there, if they cannot be written.
        """
        # Pictures of an earlier answer would pass for those of this one.
        stale = [file for file in FILES if file not in files]
        # Whoever looks for */result.json meets no half written one.
        with results(self._results / name, files, is_ours, self._unfinished, stale) as folder:
            fill(folder)

    def write_error(self, name: str, values: Mapping[str, Any]) -> None:
        self.write(name, (RECORD,), lambda folder: write_record(folder, values))

    def write_tables(self, rows: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> None:
        """All results on a line each, and the numbers of the run."""
        # Somebody may have put a file there in the meantime.
        self.refuse_foreign(())
        kind = {"format": f"{_KIND}/1"}
        lines = "".join(f"{json.dumps({**kind, **row}, allow_nan=False)}\n" for row in rows)
        write_whole(self.folder / TABLE, lines.encode())
        write_whole(self.folder / SUMMARY, f"{json.dumps({**kind, **summary}, indent=2, allow_nan=False)}\n".encode())


@contextmanager
def _lock(folder: Path) -> Iterator[bool]:
    """Hold the folder itself as the lock: the system lets go of it however the process ends. False without locks."""
    try:
        import fcntl

        descriptor = os.open(folder, os.O_RDONLY)
    except (ImportError, PermissionError):
        # Windows has no such locks and opens no folders; two runs there do the same work twice, and each result is
        # still whole.
        yield False
        return
    try:
        yield _held(fcntl, descriptor, folder)
    finally:
        os.close(descriptor)


def _held(fcntl: Any, descriptor: int, folder: Path) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise BlockingIOError(f"output: another run is at work in {folder}; wait for it or choose another") from error
    except OSError:
        # Some file systems have no locks either.
        return False
    return True
