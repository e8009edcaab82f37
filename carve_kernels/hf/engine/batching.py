"""Many questions about many pictures: those that fit in memory are answered together, results come in order."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import suppress
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from carve_kernels import checks
from carve_kernels.checks import BackendUnavailable, UpstreamChanged
from carve_kernels.hf.model import input_device
from carve_kernels.types import CarveFailure, CarveResult

if TYPE_CHECKING:
    from carve_kernels.hf.engine.engine import CarveEngine

Outcome = CarveResult | CarveFailure
OnResult = Callable[[Outcome, int, int | None], None]
_Waiting = tuple[Any, tuple[Any, ...]]

# Eight branches of a row decode in the time of one; a longer row only makes the first result wait.
MOST = 8
# The rest of the free memory is for the forward's own tensors and for whoever else needs some.
_SHARE = 4
# No matter of one question: the backend, another transformers, or a GPU that needs a new process.
_ENDS = (BackendUnavailable, UpstreamChanged, torch.AcceleratorError)
_EXPECTED = (ValueError, TypeError, OSError)
_LOG = logging.getLogger("carve_kernels")
_CGROUP = Path("/sys/fs/cgroup")


def answer_all(
    engine: CarveEngine,
    images: Any,
    questions: Any,
    prompts: Any = None,
    on_progress: OnResult | None = None,
) -> list[Outcome]:
    """The outcomes of `stream`, all of them."""
    return list(stream(engine, images, questions, prompts, on_progress=on_progress))


def stream(
    engine: CarveEngine,
    images: Any,
    questions: Any,
    prompts: Any = None,
    *,
    tokens: int | None = None,
    on_progress: OnResult | None = None,
) -> Iterator[Outcome]:
    """Ask many questions about many pictures; yields a CarveResult or a CarveFailure for each, in order.

    ===========  ======================================================================================================
    argument     meaning
    ===========  ======================================================================================================
    images       a picture (path or PIL image), or as many as there are questions: a list, or anything iterable
    questions    a text, or as many as there are pictures; what is given once is used for all
    prompts      as `questions`, each a whole prompt or None
    tokens       the most tokens that are in the cache at once; None finds it from the free memory of the device
    on_progress  on_progress(outcome, done, total), once for each, in order; total is None for iterators
    ===========  ======================================================================================================

    Questions that stand side by side are answered together as long as they fit, 8 at most, and those on one picture
    share its prefix; what the model says is what it says one by one. Whatever goes wrong with one of them (a picture
    that cannot be read, a question without its word, too little memory) is the `error` of a CarveFailure in its place,
    and the others go on. Only the pictures that are being worked on are held, so that iterators may be endless.

    Raises TypeError or ValueError, before the model runs, for lists of unequal lengths and for other types; for
    iterators of unequal lengths when the shorter one ends. BackendUnavailable and a broken GPU end a batch, too: they
    are no matter of one question.
    """
    given = {"images": images, "questions": questions, "prompts": prompts}
    many = {name: value for name, value in given.items() if _is_many(name, value)}
    total = _total(many)
    limit = _bound(engine, tokens)
    columns: list[Any] = [many.get(name, repeat(value)) for name, value in given.items()]
    rows: Iterable[tuple[Any, ...]] = _zipped(columns, many) if many else [(images, questions, prompts)]
    return _reported(_outcomes(engine, rows, limit), total if many else 1, on_progress)


def free_bytes(device: torch.device) -> int:
    """Memory that a process may still take on a device, as far as the system says."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # What torch has kept for itself is free for the next tensor.
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    found = [value for value in (_available(), _left_of_group()) if value is not None]
    return max(0, min(found)) if found else 2**30


def _available() -> int | None:
    """What the machine has left; of Linux only, since others have no file for it."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)


def _left_of_group() -> int | None:
    """What a container has left of its own limit, where it has one."""
    try:
        most = (_CGROUP / "memory.max").read_text(encoding="ascii").strip()
        used = int((_CGROUP / "memory.current").read_text(encoding="ascii"))
        facts = dict(line.split() for line in (_CGROUP / "memory.stat").read_text(encoding="ascii").splitlines())
    except OSError:
        return None
    # Files in the page cache count as used, and go when memory is wanted.
    return None if most == "max" else int(most) - used + int(facts.get("inactive_file", 0))


def _bound(engine: CarveEngine, tokens: int | None) -> int:
    if tokens is not None:
        return checks.integer("tokens", tokens, low=1)
    return max(1, free_bytes(input_device(engine.model)) // _SHARE // engine.bytes_per_token)


def _is_many(name: str, value: Any) -> bool:
    """Whether an argument holds one thing for each question, or one for all of them."""
    if holds_many(value):
        return True
    if isinstance(value, (str, os.PathLike, Image.Image)) or (value is None and name == "prompts"):
        return False
    one = "a path or a PIL image" if name == "images" else "a text"
    raise TypeError(f"{name}: expected {one}, a list or an iterator of them, got {checks.describe(value)}")


def holds_many(value: Any) -> bool:
    """Whether this is a list of things, or an iterable that gives them in its order; no array and no open file is."""
    alone = (str, os.PathLike, Image.Image, bytes, bytearray, memoryview, Mapping, Set)
    is_alone = isinstance(value, alone) or hasattr(value, "shape") or hasattr(value, "read")
    return isinstance(value, Iterable) and not is_alone


def _total(many: dict[str, Any]) -> int | None:
    """The number of questions, None where nobody knows before they are asked."""
    lengths = {}
    for name, value in many.items():
        # A loader may have a length that it does not know.
        with suppress(TypeError):
            lengths[name] = len(value)
    if len(set(lengths.values())) > 1:
        raise ValueError(f"{', '.join(lengths)}: expected one length, got {', '.join(map(str, lengths.values()))}")
    return next(iter(lengths.values()), None)


def _zipped(columns: list[Any], many: dict[str, Any]) -> Iterator[tuple[Any, ...]]:
    iterators = [iter(column) for column in columns]
    shared = {index for index, column in enumerate(columns) if isinstance(column, repeat)}
    missing = object()
    count = 0
    while True:
        row = tuple(next(iterator, missing) for iterator in iterators)
        ended = [index for index, value in enumerate(row) if value is missing]
        if ended:
            if len(ended) + len(shared) < len(row):
                raise ValueError(f"{', '.join(many)}: expected as many of each, but one ended after {count}")
            return
        count += 1
        yield row


def _outcomes(engine: CarveEngine, rows: Iterable[tuple[Any, ...]], limit: int) -> Iterator[Outcome]:
    """Outcomes in the order of the rows; requests wait until no more of them fit."""
    waiting: list[_Waiting] = []
    held = 0
    source = iter(rows)
    while True:
        try:
            asked = next(source, None)
            found = None if asked is None else _prepared(engine, asked)
        except Exception:
            # What stands before it is answered all the same.
            yield from _answered(engine, waiting)
            raise
        if asked is None or found is None:
            break
        failed = isinstance(found, CarveFailure)
        if failed or (waiting and held + found.tokens > limit):
            together = len(waiting)
            yield from _answered(engine, waiting)
            waiting, held = [], 0
            if failed and together and _is_memory(found.error):
                # Alone, it may have the room that the others took.
                found = _prepared(engine, asked)
        if isinstance(found, CarveFailure):
            yield found
            continue
        waiting.append((found, asked))
        held += found.tokens
        # Whoever answers lets go of the requests, and so must this frame.
        found = None
        if held >= limit or len(waiting) == MOST:
            yield from _answered(engine, waiting)
            waiting, held = [], 0
    yield from _answered(engine, waiting)


def _prepared(engine: CarveEngine, asked: tuple[Any, ...]) -> Any:
    """The request of one question, or the failure that stands in its place."""
    try:
        return engine.request(*asked)
    except Exception as error:
        return _failure(error, *asked)


def _answered(engine: CarveEngine, waiting: list[_Waiting]) -> Iterator[Outcome]:
    """The outcomes of a group, which is empty behind it; if it fails together, of each one alone."""
    if not waiting:
        return
    group = [asked for _, asked in waiting]
    outcomes: Sequence[Outcome] = ()
    try:
        outcomes = engine.answer([request for request, _ in waiting])
    except Exception as error:
        if len(group) == 1 or isinstance(error, _ENDS):
            outcomes = [_failure(error, *group[0])]
        else:
            # Its text alone: a record that is kept would keep the frames, and with them all tensors.
            _LOG.warning("batch: %d questions together failed (%s); asking them one by one", len(group), str(error))
    # The pictures of all of them may be what did not fit.
    waiting.clear()
    if outcomes:
        yield from outcomes
        return
    for asked in group:
        yield from _alone(engine, asked)


def _alone(engine: CarveEngine, asked: tuple[Any, ...]) -> Iterator[Outcome]:
    found = _prepared(engine, asked)
    if isinstance(found, CarveFailure):
        yield found
        return
    waiting: list[_Waiting] = [(found, asked)]
    found = None
    yield from _answered(engine, waiting)


def _failure(error: Exception, image: Any, question: str, prompt: str | None) -> CarveFailure:
    """What stands in the place of one question, unless the error is no matter of that one: then it goes on its way."""
    if isinstance(error, _ENDS):
        raise error
    if not isinstance(error, _EXPECTED) and not _is_memory(error):
        _LOG.error("batch: question %r failed", question, exc_info=error)
    # The frames of a traceback would hold on to every tensor that was in use.
    link: BaseException | None = error
    while link is not None:
        link.__traceback__ = None
        link = link.__cause__ or link.__context__
    return CarveFailure(question, image, error, prompt)


def _is_memory(error: Exception) -> bool:
    # torch has no class of its own for a CPU without memory.
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error)


def _reported(outcomes: Iterator[Outcome], total: int | None, on_progress: OnResult | None) -> Iterator[Outcome]:
    for done, outcome in enumerate(outcomes, 1):
        if on_progress is not None:
            on_progress(outcome, done, total)
        yield outcome
