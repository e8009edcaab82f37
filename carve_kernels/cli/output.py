"""What every command shares: folders filled all or nothing, errors in one line, a bar over the stages, versions."""

from __future__ import annotations

import io
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
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

# What users type, by what it is called where it is checked.
TYPED = {"text": "question", "images": "image"}
# What users type, by what a message advises whoever calls from Python.
_ADVICE = {
    "raise max_image_pixels": "raise --max-image-pixels",
    "pass allow_pickle=True": "pass --allow-pickle",
    "use attn_implementation='sdpa'": "use --attn sdpa",
}

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""

TEMPORARY = ".carve-"
# Seconds.
_EVERY = 30.0
PACKAGES = ("torch", "transformers", "triton", "torchvision", "numpy", "scipy", "scikit-image", "pillow", "safetensors")

Announce = Callable[[str], None]


class _Clock:
    """How long the command has been at work, the import of its libraries included."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        self._began = time.perf_counter()

    def seconds(self) -> float:
        return time.perf_counter() - self._began


clock = _Clock()


@contextmanager
def printable() -> Iterator[None]:
    """Within, characters that the terminal's encoding lacks are printed as escapes: they are no reason to fail."""
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
    Console(stderr=True).print(Text(f"error: {one_line(message)}{hint}", style="bold red"), soft_wrap=True)


def note(message: str) -> None:
    """One yellow line on stderr: something that a user may not have meant."""
    Console(stderr=True).print(Text(message, style="yellow"), soft_wrap=True)


def number_of(count: int, what: str) -> str:
    """A count with its word: 1 question, 2 questions."""
    return f"{count} {what}{'' if count == 1 else 's'}"


def one_line(message: object) -> str:
    """A text without line breaks, and without anything else that would steer a terminal."""
    text = str(message)
    if not text and isinstance(message, Exception):
        # Where there is no memory, Python says no more.
        text = type(message).__name__
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())


def advised(message: str) -> str:
    """A message that advises options where it did arguments."""
    for argument, option in _ADVICE.items():
        message = message.replace(argument, option)
    return message


def as_typed(error: Exception) -> str:
    """An error about a line of questions in one line; it begins with the key that stands in the file."""
    message = advised(one_line(error))
    name, colon, rest = message.partition(":")
    return f"{TYPED[name]}:{rest}" if colon and name in TYPED else message


def exit_code(error: Exception) -> int | None:
    """2 for an argument that does not fit, 1 for anything else that can be expected, None for a fault of ours."""
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

    own = {"carve_kernels": __version__, "python": ".".join(map(str, sys.version_info[:3]))}
    return {**own, **{package: _version(package) for package in PACKAGES}}


@cache
def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@contextmanager
def results(
    folder: Path,
    names: Sequence[str],
    is_ours: Callable[[Path], bool],
    within: Path | None = None,
    stale: Sequence[str] = (),
) -> Iterator[Path]:
    """A temporary folder; at the end its files, called `names`, move into `folder` all together, or none does.

    Files called `stale` go when they come. The last of `names` is there with all others that belong to it, or not at
    all, even if the process is killed. The temporary folder is made in `within`, on the same file system as `folder`,
    or in the first folder above that is there.

    Raises OSError at once if that cannot work, so that nobody waits for a model in vain, and ValueError if it would
    replace a file that is not one of ours.
    """
    folder = folder.absolute()
    base = within or next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not base.is_dir():
        raise NotADirectoryError(f"output: {base} is no folder; choose another --output")
    places = [folder / name for name in (*names, *stale)]
    refuse_taken(places, is_ours)
    try:
        # On the same file system as `folder`, so that a move is a renaming.
        temporary = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=base))
    except OSError as error:
        raise type(error)(f"output: cannot write into {base} ({error.strerror}); choose another --output") from error
    try:
        yield temporary
        # Somebody may have put them there in the meantime.
        refuse_taken(places, is_ours)
        _move(temporary, folder, names, stale)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def refuse_taken(places: Iterable[Path], is_ours: Callable[[Path], bool]) -> None:
    """Raise IsADirectoryError or ValueError for a place where a folder stands, or a file that is not one of ours."""
    for place in places:
        if place.is_dir():
            raise IsADirectoryError(f"output: {place} is a folder; choose another --output")
        refuse_foreign("output", place, is_ours)


def _move(source: Path, folder: Path, names: Sequence[str], stale: Sequence[str]) -> None:
    before = source / "before"
    before.mkdir()
    # A name may reach the disk before what it names.
    for name in names:
        sync(source / name)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # What one file says of another goes after it.
        for name in (*reversed(names), *reversed(stale)):
            if os.path.lexists(folder / name):
                os.replace(folder / name, before / name)
        for name in names:
            os.replace(source / name, folder / name)
        sync(folder)
    except BaseException:
        for name in reversed(names):
            if not (source / name).exists():
                (folder / name).unlink(missing_ok=True)
        for name in (*stale, *names):
            if os.path.lexists(before / name):
                os.replace(before / name, folder / name)
        with suppress(OSError):
            for path in made:
                path.rmdir()
        raise


@contextmanager
def stages(total: int) -> Iterator[Announce]:
    """A bar on stderr over so many stages; what it yields is called with a text when a stage begins."""
    columns = SpinnerColumn("line"), BarColumn(24), TextColumn("{task.description}"), TimeElapsedColumn()
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("", total=total)
        begun = 0
        tell = _teller(console)

        def announce(text: str) -> None:
            nonlocal begun
            progress.update(bar, completed=begun, description=text)
            begun += 1
            tell(f"{begun} of {total}: {text}")

        yield announce


def _teller(console: Console) -> Callable[[str], None]:
    """Prints how far the work is where there is no terminal for a bar, no more often than anybody would look."""
    last = time.perf_counter()

    def tell(text: str) -> None:
        nonlocal last
        if not console.is_terminal and time.perf_counter() - last >= _EVERY:
            last = time.perf_counter()
            console.print(Text(text), soft_wrap=True)

    return tell


class _Rate(ProgressColumn):
    """How many a second, or how many seconds each, of late."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        if not speed:
            return Text("")
        return Text(f"{speed:.1f}/s" if speed >= 1 else f"{1 / speed:.1f} s each")


@contextmanager
def counted(total: int, done: int, text: str) -> Iterator[Callable[[], None]]:
    """A bar on stderr over so many things, with their rate and the time left; what it yields is called after each."""
    columns = (
        *(SpinnerColumn("line"), BarColumn(24), MofNCompleteColumn(), TextColumn("{task.description}")),
        *(_Rate(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn()),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task(text, total=total, completed=done)
        tell = _teller(console)

        def advance() -> None:
            nonlocal done
            progress.advance(bar)
            done += 1
            tell(f"{done} of {total} {text}")

        yield advance
