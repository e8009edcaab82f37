"""What every command shares: folders filled all or nothing, errors in one line, a bar over the stages, versions."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
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

from carve_kernels.files import sync

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""

TEMPORARY = ".carve-"
PACKAGES = ("torch", "transformers", "triton", "torchvision", "numpy", "scipy", "scikit-image", "pillow", "safetensors")

Announce = Callable[[str], None]


def fail(message: object) -> None:
    """One red line on stderr."""
    hint = "; carve-kernels doctor says what is missing" if isinstance(message, ImportError) else ""
    Console(stderr=True).print(Text(f"error: {one_line(message)}{hint}", style="bold red"), soft_wrap=True)


def note(message: str) -> None:
    """One yellow line on stderr: something that a user may not have meant."""
    Console(stderr=True).print(Text(message, style="yellow"), soft_wrap=True)


def one_line(message: object) -> str:
    """A text without line breaks, and without anything else that would steer a terminal."""
    text = str(message)
    if not text and isinstance(message, Exception):
        # Where there is no memory, Python says no more.
        text = type(message).__name__
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())


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
    folder: Path, names: Sequence[str], within: Path | None = None, stale: Sequence[str] = ()
) -> Iterator[Path]:
    """A temporary folder; at the end its files, called `names`, move into `folder` all together, or none does.

    Files called `stale` go when they come. The last of `names` is there with all others that belong to it, or not at
    all, even if the process is killed. The temporary folder is made in `within`, on the same file system as `folder`,
    or in the first folder above that is there.

    Raises OSError at once if that cannot work, so that nobody waits for a model in vain.
    """
    folder = folder.absolute()
    base = within or next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not base.is_dir():
        raise NotADirectoryError(f"output: {base} is no folder; choose another --output")
    taken = [name for name in (*names, *stale) if (folder / name).is_dir()]
    if taken:
        raise IsADirectoryError(f"output: {folder / taken[0]} is a folder; choose another --output")
    try:
        # On the same file system as `folder`, so that a move is a renaming.
        temporary = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=base))
    except OSError as error:
        raise type(error)(f"output: cannot write into {base} ({error.strerror}); choose another --output") from error
    try:
        yield temporary
        _move(temporary, folder, names, stale)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _move(source: Path, folder: Path, names: Sequence[str], stale: Sequence[str]) -> None:
    before = source / "before"
    before.mkdir()
    # A name may reach the disk before what it names.
    for name in names:
        sync(source / name)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in (*reversed(names), *stale):
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
    columns = SpinnerColumn(), BarColumn(24), TextColumn("{task.description}"), TimeElapsedColumn()
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("", total=total)
        begun = 0

        def announce(text: str) -> None:
            nonlocal begun
            progress.update(bar, completed=begun, description=text)
            begun += 1

        yield announce


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
        *(SpinnerColumn(), BarColumn(24), MofNCompleteColumn(), TextColumn("{task.description}")),
        *(_Rate(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn()),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task(text, total=total, completed=done)
        yield lambda: progress.advance(bar)
