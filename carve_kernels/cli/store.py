"""The output folder of `batch`, filled by many runs, one at a time: a result that has its record is complete."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from carve_kernels.cli import video
from carve_kernels.cli.ours import is_json, refuse_inputs, write_json
from carve_kernels.cli.output import TEMPORARY, check_folder, refuse_taken, replace_files, temporary_folder
from carve_kernels.cli.report import FILES, RECORD, is_ours, stale_in

TABLE = "results.jsonl"
SUMMARY = "summary.json"
_KIND = "carve_kernels.batch"
_UNFINISHED = f"{TEMPORARY}batch-"


class Store:
    """results/NAME/result.json for each question, and tables of all of them at the end."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._results = folder, folder / "results"
        self._temporary = folder

    @contextmanager
    def opened(self) -> Iterator[Store]:
        """Make the folder, keep other runs out of it, and remove what a killed run left unfinished.

        A folder that stays empty is removed. Raises ValueError if the path is a file's, OSError if the folder cannot be
        made or is in use by another run.
        """
        check_folder(self.folder)
        created = [path for path in (self._results, *self._results.parents) if not path.exists()]
        try:
            self._results.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise type(error)(f"output: cannot write into {self.folder} ({error.strerror}); choose another") from error
        try:
            with _lock(self.folder) as locked:
                for path in self.folder.glob(f"{_UNFINISHED}*") if locked else ():
                    shutil.rmtree(path, ignore_errors=True)
                with temporary_folder(_UNFINISHED, self.folder) as self._temporary:
                    yield self
        finally:
            with suppress(OSError):
                for path in created:
                    path.rmdir()

    def refuse_twins(self, names: Iterable[str]) -> None:
        """Raise ValueError for two names that are one folder here: Windows and macOS do not tell A from a."""
        swapped = self._temporary.with_name(self._temporary.name.swapcase())
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

    def refuse_inputs(self, files: Mapping[str, Sequence[str]], inputs: Mapping[str, Iterable[Path]]) -> None:
        """Raise ValueError for an output that is also an input; `files` are by name, `inputs` paths by their option."""
        results = (self._results / name / file for name, each in files.items() for file in each)
        refuse_inputs((self.folder / TABLE, self.folder / SUMMARY, *results), inputs)

    def refuse_foreign(self, files: Mapping[str, Sequence[str]]) -> None:
        """Raise ValueError for a table, or a file of these results, by name, that the commands did not write."""
        refuse_taken((self.folder / TABLE, self.folder / SUMMARY), is_json(_KIND))
        refuse_taken((self._results / name / file for name, each in files.items() for file in each), _is_ours)

    def read(self, name: str) -> dict[str, Any] | None:
        """The record of a result; None where there is none, or a damaged one."""
        try:
            values = json.loads((self._results / name / RECORD).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return None
        return values if isinstance(values, dict) else None

    def has(self, name: str, marks: Mapping[str, str | None], images: bool, files: Sequence[str] = FILES) -> bool:
        """Whether this very question was answered without an error, and its `files` are there if images are wanted.

        A mark of None is unknown and not compared: an answer outlives the file of its image.
        """
        record = self.read(name)
        return (
            record is not None
            and record.get("error", "") is None
            and all(value is None or record.get(key) == value for key, value in marks.items())
            and (not images or all((self._results / name / file).is_file() for file in files))
        )

    def write(self, name: str, files: Sequence[str], fill: Callable[[Path], None]) -> None:
        """Replace the files of a result by those that `fill` writes into a temporary folder, the record last."""
        # Images of an earlier answer would pass for those of this one.
        stale = stale_in(self._results / name, files)
        stale += [file for file in video.files() if file not in files]
        # Inside of the run's temporary folder, so that a search for */result.json meets no unfinished one.
        with replace_files(self._results / name, files, _is_ours, self._temporary, stale) as folder:
            fill(folder)

    def write_tables(self, rows: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> None:
        """All results on a line each, and the counts of the run."""
        lines = (json.dumps({"format": f"{_KIND}/1", **row}, allow_nan=False) for row in rows)
        with replace_files(self.folder, (SUMMARY, TABLE), is_json(_KIND), self._temporary) as folder:
            write_json(folder / SUMMARY, _KIND, summary)
            (folder / TABLE).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _is_ours(path: Path) -> bool:
    """Whether `run` wrote a file of a result, about images or a video."""
    return video.is_ours(path) if path.name in video.files() else is_ours(path)


@contextmanager
def _lock(folder: Path) -> Iterator[bool]:
    """Lock the folder itself: the system unlocks it however the process ends. Yields False where there are no locks."""
    try:
        import fcntl

        descriptor = os.open(folder, os.O_RDONLY)
    except (ImportError, PermissionError):
        # Windows has no such locks and opens no folders; two runs there repeat each other's work, and each result is
        # still complete.
        yield False
        return
    locked = True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise BlockingIOError(f"output: {folder} is in use by another run; wait for it or choose another") from error
    except OSError:
        # Some file systems have no locks either.
        locked = False
    try:
        yield locked
    finally:
        os.close(descriptor)
