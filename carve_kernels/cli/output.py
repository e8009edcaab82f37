"""What every command shares: output files, errors in one line, progress bars, versions."""

from __future__ import annotations

import io
import itertools
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import metadata
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from carve_kernels.atomic_write import refuse_foreign, sync

# The names that users type, by the names under which they are checked.
TYPED = {"text": "question", "images": "image"}
# What users type, by what a message advises callers from Python.
_ADVICE = {
    "raise max_image_pixels": "raise --max-image-pixels",
    "pass allow_pickle=True": "pass --allow-pickle",
    "use attn_implementation='sdpa'": "use --attn sdpa",
}

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""

TEMPORARY = ".carve-"
# Seconds between two lines of progress without a terminal.
_INTERVAL = 30.0
PACKAGES = ("torch", "transformers", "triton", "torchvision", "numpy", "scipy", "scikit-image", "pillow", "safetensors")

Announce = Callable[[str], None]


class _Clock:
    """Seconds since the command started, the import of its libraries included."""

    _start = time.perf_counter()

    def start(self) -> None:
        self._start = time.perf_counter()

    def seconds(self) -> float:
        return time.perf_counter() - self._start


clock = _Clock()


@contextmanager
def printable() -> Iterator[None]:
    """Print characters that the terminal's encoding lacks as escapes, rather than fail."""
    streams = [stream for stream in (sys.stdout, sys.stderr) if isinstance(stream, io.TextIOWrapper)]
    before = [stream.errors for stream in streams]
    for stream in streams:
        stream.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        for stream, errors in zip(streams, before, strict=True):
            if not stream.closed:
                stream.reconfigure(errors=errors)


def fail(message: object) -> None:
    """One red line on stderr."""
    hint = "; carve-kernels doctor says what is missing" if isinstance(message, ImportError) else ""
    say(f"error: {one_line(message)}{hint}", "bold red", stderr=True)


def note(message: str) -> None:
    """One yellow line on stderr: something that the user may not expect."""
    say(message, "yellow", stderr=True)


def say(text: str, style: str = "", *, stderr: bool = False) -> None:
    """One line, which a terminal may break but this package does not."""
    Console(stderr=stderr).print(Text(text, style=style), soft_wrap=True)


def number_of(count: int, what: str) -> str:
    """A count with its word: 1 question, 2 questions."""
    return f"{count} {what}{'' if count == 1 else 's'}"


def first_few(lines: Sequence[str]) -> str:
    """The first five lines of many, joined, and how many more there are."""
    more = f"; and {len(lines) - 5} more" if len(lines) > 5 else ""
    return f"{'; '.join(lines[:5])}{more}"


def one_line(message: object) -> str:
    """A text without line breaks and other control characters of a terminal."""
    text = str(message)
    if not text and isinstance(message, Exception):
        # A MemoryError has no message.
        text = type(message).__name__
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())


def advised(message: str) -> str:
    """A message with options in place of the arguments that it advises."""
    for argument, option in _ADVICE.items():
        message = message.replace(argument, option)
    return message


def as_typed(error: Exception) -> str:
    """An error about a line of questions, in one line that begins with the key in the file."""
    message = advised(one_line(error))
    name, colon, rest = message.partition(":")
    return f"{TYPED[name]}:{rest}" if colon and name in TYPED else message


def exit_code(error: Exception) -> int | None:
    """2 for a bad argument, 1 for another expected error, None for a bug of this package."""
    if isinstance(error, (ValueError, TypeError)):
        return 2
    if isinstance(error, (ImportError, OSError, MemoryError)):
        return 1
    if sys.modules.get("torch") is None:
        return None
    import torch

    from carve_kernels.checks import BackendUnavailable, UpstreamChanged

    return 1 if isinstance(error, (BackendUnavailable, UpstreamChanged, torch.OutOfMemoryError)) else None


def versions() -> dict[str, str | None]:
    """The version of Python and of each package, None where it is missing."""
    from carve_kernels import __version__

    python = ".".join(map(str, sys.version_info[:3]))
    return {"carve_kernels": __version__, "python": python, **{name: _version(name) for name in PACKAGES}}


@cache
def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@contextmanager
def replace_files(
    folder: Path,
    names: Sequence[str],
    is_ours: Callable[[Path], bool],
    within: Path | None = None,
    stale: Sequence[str] = (),
) -> Iterator[Path]:
    """A temporary folder; at the end its files, called `names`, replace those in `folder`, and files `stale` go.

    While files are exchanged, the last of `names` is missing: where it is there, all others that belong to it are,
    even if the process was killed. The temporary folder is made in `within`, on the same file system as `folder`, or
    in the first existing folder above.

    Raises at once, before a model is loaded: ValueError if the folder can be none, or a file that is not one of ours
    would be replaced, OSError if nothing can be written there.
    """
    folder = folder.absolute()
    check_folder(folder)
    base = within or _existing(folder)
    paths = [folder / name for name in (*names, *stale)]
    refuse_taken(paths, is_ours)
    # On the same file system as `folder`, so that a move is a renaming.
    with temporary_folder(TEMPORARY, base) as temporary:
        yield temporary
        # Other programs may have put files there in the meantime.
        refuse_taken(paths, is_ours)
        with _uninterrupted():
            _move(temporary, folder, names, [name for name in stale if (folder / name).exists()])


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Let Ctrl-C wait until files are exchanged: KeyboardInterrupt then says that they were written."""
    in_main = threading.current_thread() is threading.main_thread()
    # None: the handler is not one of Python's.
    if not in_main or signal.getsignal(signal.SIGINT) is None:
        yield
        return
    waiting: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _frame: waiting.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if waiting:
        raise KeyboardInterrupt("all files were written")


def check_folder(folder: Path) -> None:
    """Raise ValueError for the path of something else, or one that no folder can have, such as one that is too long."""
    try:
        os.lstat(folder)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        pass
    except OSError as error:
        raise ValueError(f"output: {folder} cannot be a folder ({error.strerror}); choose another --output") from error
    base = _existing(folder)
    if not base.is_dir():
        raise ValueError(f"output: {base} is not a folder; choose another --output")


def _existing(folder: Path) -> Path:
    """The folder itself, or the first path above it that exists."""
    return next(path for path in (folder, *folder.parents) if os.path.lexists(path))


@contextmanager
def temporary_folder(prefix: str, base: Path) -> Iterator[Path]:
    """A folder in `base`, removed at the end; OSError names the option if it cannot be made."""
    try:
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=base))
    except OSError as error:
        raise type(error)(f"output: cannot write into {base} ({error.strerror}); choose another --output") from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def refuse_taken(paths: Iterable[Path], is_ours: Callable[[Path], bool]) -> None:
    """Raise ValueError for a path of a folder, or of a file that is not one of ours."""
    for path in paths:
        if path.is_dir():
            raise ValueError(f"output: {path} is a folder; choose another --output")
        refuse_foreign("output", path, is_ours)


def _move(source: Path, folder: Path, names: Sequence[str], stale: Sequence[str]) -> None:
    # A name may reach the disk before what it names.
    for name in names:
        sync(source / name)
    folder.mkdir(parents=True, exist_ok=True)
    others = (*names[:-1], *stale)
    if others:
        # The last name goes first. A file that another one identifies is removed before that one.
        for name in (names[-1], *reversed(others)):
            (folder / name).unlink(missing_ok=True)
    for name in names:
        os.replace(source / name, folder / name)
    sync(folder)


@contextmanager
def stages(total: int) -> Iterator[Announce]:
    """A bar on stderr over `total` stages; call what it yields with a text when a stage begins."""
    started = itertools.count()
    with _bar(total, 0, "", TextColumn("{task.description}"), TimeElapsedColumn()) as update:

        def announce(text: str) -> None:
            done = next(started)
            update(f"{done + 1} of {total}: {text}", done, text)

        yield announce


@contextmanager
def counted(total: int, done: int, text: str) -> Iterator[Callable[[], None]]:
    """A bar on stderr over `total` items with their rate and the time left; call what it yields after each item."""
    numbers = itertools.count(done + 1)
    columns = MofNCompleteColumn(), TextColumn("{task.description}"), _Rate(), TimeElapsedColumn(), TextColumn("left")
    with _bar(total, done, text, *columns, TimeRemainingColumn()) as update:

        def advance() -> None:
            number = next(numbers)
            update(f"{number} of {total} {text}", number, text)

        yield advance


class _Rate(ProgressColumn):
    """The recent rate: so many a second, or so many seconds each."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        if not speed:
            return Text("")
        return Text(f"{speed:.1f}/s" if speed >= 1 else f"{1 / speed:.1f} s each")


@contextmanager
def _bar(total: int, done: int, text: str, *columns: ProgressColumn) -> Iterator[Callable[[str, int, str], None]]:
    """A bar; call what it yields with a line, the number of items done, and the text of the bar.

    Without a terminal for the bar the lines are printed, at most one in each interval.
    """
    console = Console(stderr=True)
    bar = Progress(
        SpinnerColumn("line"), BarColumn(24), *columns, console=console, transient=True, disable=not console.is_terminal
    )
    task = bar.add_task(text, total=total, completed=done)
    last = time.perf_counter()

    def update(line: str, done: int, text: str) -> None:
        nonlocal last
        bar.update(task, completed=done, description=text)
        if not console.is_terminal and time.perf_counter() - last >= _INTERVAL:
            last = time.perf_counter()
            console.print(Text(line), soft_wrap=True)

    with bar:
        yield update
