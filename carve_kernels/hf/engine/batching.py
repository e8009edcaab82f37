"""Many questions about many images: as many as fit in memory run in one batch, results are in order."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import repeat
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image

from carve_kernels import checks
from carve_kernels.checks import BackendUnavailable, UpstreamChanged
from carve_kernels.hf.engine.requests import Request
from carve_kernels.hf.engine.result import CarveFailure, CarveResult

Result = CarveResult | CarveFailure
OnResult = Callable[[Result, int, int | None], None]
_Pending = tuple[Request, tuple[Any, ...]]

# Eight prompts take about as long as one; larger batches only delay the first result.
MAX_BATCH = 8
# KV caches get a quarter of the free memory; the rest is for activations and other processes.
_SHARE = 4
# A request has states of recurrent layers behind its image, behind its question, and behind the general instruction.
_STATES = 3
# Errors that end the whole batch: the backend, another transformers, or a GPU that needs a new process.
_FATAL = (BackendUnavailable, UpstreamChanged, torch.AcceleratorError)
_EXPECTED = (ValueError, TypeError, OSError)
_LOG = logging.getLogger("carve_kernels")
_CGROUP = Path("/sys/fs/cgroup")


class Engine(Protocol):
    """What a batch needs of an engine."""

    @property
    def device(self) -> torch.device: ...

    @property
    def bytes_per_token(self) -> int: ...

    @property
    def bytes_per_prompt(self) -> int: ...

    def request(self, image: Any, question: str, prompt: str | None = None) -> Request: ...

    def answer(self, requests: Sequence[Request]) -> list[CarveResult]: ...


def answer_all(
    engine: Engine,
    images: Any,
    questions: Any,
    prompts: Any = None,
    on_progress: OnResult | None = None,
) -> list[Result]:
    """All results of `stream`, for the arguments of a call of the engine."""
    given = {"image": images, "question": questions, "prompt": prompts}
    return list(_stream(engine, given, None, on_progress))


def stream(
    engine: Engine,
    images: Any,
    questions: Any,
    prompts: Any = None,
    *,
    tokens: int | None = None,
    on_progress: OnResult | None = None,
) -> Iterator[Result]:
    """Answer many questions about many images; yields a CarveResult or a CarveFailure for each, in order.

    ===========  ======================================================================================================
    argument     meaning
    ===========  ======================================================================================================
    images       an image (path or PIL image), or one for each question: a list, or any iterable; an item may itself be
                 a list or tuple, of the images that its question is about
    questions    a text, or one for each image; a single value is used for all
    prompts      as `questions`, each a whole prompt or None
    tokens       the largest number of tokens in the KV caches; None derives it from the free memory of the device
    on_progress  on_progress(result, done, total), once for each, in order; total is None for iterators
    ===========  ======================================================================================================

    Neighbouring questions run in one batch, as many as fit and 8 at most, and those about one image share its prefix
    cache; answers are the same as one by one. If one fails (an image that cannot be read, a question without its word,
    too little memory), it yields a CarveFailure with its `error`, and the others are still answered. Only the images of
    the current batch are in memory, so iterators may be endless.

    Raises TypeError or ValueError, before the model runs, for lists of unequal lengths and for other types; for
    iterators of unequal lengths when the shorter one ends. BackendUnavailable and a broken GPU end the whole batch.
    """
    given = {"images": images, "questions": questions, "prompts": prompts}
    return _stream(engine, given, tokens, on_progress)


def _stream(
    engine: Engine, given: Mapping[str, Any], tokens: int | None, on_progress: OnResult | None
) -> Iterator[Result]:
    """`stream` of images, questions and prompts, by the names that they were passed under."""
    checks.function("on_progress", on_progress)
    many = {name: value for name, value in given.items() if _is_many(name, value)}
    total = _total(many)
    limit, own = _token_limit(engine, tokens)
    columns: list[Any] = [many.get(name, repeat(value)) for name, value in given.items()]
    calls: Iterable[tuple[Any, ...]] = _zip(columns, many) if many else [tuple(given.values())]
    return _report(_results(engine, calls, limit, own), total if many else 1, on_progress)


def free_bytes(device: torch.device) -> int:
    """An estimate of the bytes that this process can still allocate on a device."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # What torch's allocator has reserved is free for the next tensor.
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    limits = [value for value in (_available(), _available_in_cgroup()) if value is not None]
    return max(0, min(limits)) if limits else 2**30


def _available() -> int | None:
    """Free memory of the machine; on Linux only."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)


def _available_in_cgroup() -> int | None:
    """Free memory below the limit of a container, if there is one."""
    try:
        limit = (_CGROUP / "memory.max").read_text(encoding="ascii").strip()
        used = int((_CGROUP / "memory.current").read_text(encoding="ascii"))
        facts = dict(line.split() for line in (_CGROUP / "memory.stat").read_text(encoding="ascii").splitlines())
    except OSError:
        return None
    # Files in the page cache count as used, and are evicted when memory is needed.
    return None if limit == "max" else int(limit) - used + int(facts.get("inactive_file", 0))


def _token_limit(engine: Engine, tokens: int | None) -> tuple[int, int]:
    """The most tokens of a batch, and how many tokens take as much memory as the states of one request."""
    if tokens is not None:
        return checks.integer("tokens", tokens, low=1), 0
    each = engine.bytes_per_token
    return max(1, free_bytes(engine.device) // _SHARE // each), -(-_STATES * engine.bytes_per_prompt // each)


def _is_many(name: str, value: Any) -> bool:
    """Whether an argument has one value for each question, or one for all of them."""
    if checks.is_many(value):
        return True
    if isinstance(value, (str, os.PathLike, Image.Image)) or (value is None and name in ("prompt", "prompts")):
        return False
    one = "a path or a PIL image" if name in ("image", "images") else "a text"
    raise TypeError(f"{name}: expected {one}, a list or an iterator of them, got {checks.describe(value)}")


def _total(many: dict[str, Any]) -> int | None:
    """The number of questions; None for iterators, which do not know it."""
    lengths = {}
    for name, value in many.items():
        # A data loader may define __len__ and still not know its length.
        with suppress(TypeError):
            lengths[name] = len(value)
    if len(set(lengths.values())) > 1:
        raise ValueError(f"{', '.join(lengths)}: expected one length, got {', '.join(map(str, lengths.values()))}")
    return next(iter(lengths.values()), None)


def _zip(columns: list[Any], many: dict[str, Any]) -> Iterator[tuple[Any, ...]]:
    iterators = [iter(column) for column in columns]
    shared = {index for index, column in enumerate(columns) if isinstance(column, repeat)}
    missing = object()
    count = 0
    while True:
        call = tuple(next(iterator, missing) for iterator in iterators)
        ended = [index for index, value in enumerate(call) if value is missing]
        if ended:
            if len(ended) + len(shared) < len(call):
                raise ValueError(f"{', '.join(many)}: expected as many of each, but one ended after {count}")
            return
        count += 1
        yield call


def _results(engine: Engine, calls: Iterable[tuple[Any, ...]], limit: int, own: int) -> Iterator[Result]:
    """Results in the order of the calls; requests are pending until no more fit, each with `own` tokens more."""
    pending: list[_Pending] = []
    tokens = 0
    source = iter(calls)
    while True:
        try:
            call = next(source, None)
            request = None if call is None else _prepare(engine, call)
        except Exception:
            # Answer the pending requests first, then raise.
            yield from _answer(engine, pending)
            raise
        if call is None or request is None:
            break
        failed = isinstance(request, CarveFailure)
        if failed or (pending and tokens + request.tokens + own > limit):
            had_pending = len(pending)
            yield from _answer(engine, pending)
            pending, tokens = [], 0
            if failed and had_pending and _is_out_of_memory(request.error):
                # Retry: answering the pending requests has freed memory.
                request = _prepare(engine, call)
        if isinstance(request, CarveFailure):
            yield request
            continue
        pending.append((request, call))
        tokens += request.tokens + own
        # _answer frees the requests, so this frame must not hold one.
        request = None
        if tokens >= limit or len(pending) == MAX_BATCH:
            yield from _answer(engine, pending)
            pending, tokens = [], 0
    yield from _answer(engine, pending)


def _prepare(engine: Engine, call: tuple[Any, ...]) -> Any:
    """The request of one call, or its failure."""
    try:
        return engine.request(*call)
    except Exception as error:
        return _failure(error, *call)


def _answer(engine: Engine, pending: list[_Pending]) -> Iterator[Result]:
    """The results of a batch, which is empty afterwards; if it fails as a whole, of each request alone."""
    if not pending:
        return
    calls = [call for _, call in pending]
    results: Sequence[Result] = ()
    try:
        results = engine.answer([request for request, _ in pending])
    except Exception as error:
        if len(calls) == 1 or isinstance(error, _FATAL):
            results = [_failure(error, *calls[0])]
        else:
            # Only the text is logged: a record with the traceback would keep all tensors of its frames.
            _LOG.warning(
                "batch: %d questions failed in one batch (%s); answering them one by one", len(calls), str(error)
            )
    # The images of the whole batch may be what did not fit.
    pending.clear()
    if results:
        yield from results
        return
    for call in calls:
        request = _prepare(engine, call)
        if isinstance(request, CarveFailure):
            yield request
            continue
        single: list[_Pending] = [(request, call)]
        request = None
        yield from _answer(engine, single)


def _failure(error: Exception, image: Any, question: str, prompt: str | None) -> CarveFailure:
    """The failure of one question; an error that ends the whole batch is raised again."""
    if isinstance(error, _FATAL):
        raise error
    if not isinstance(error, _EXPECTED) and not _is_out_of_memory(error):
        _LOG.error("batch: question %r failed", question, exc_info=error)
    # The frames of a traceback would keep every tensor that was in use.
    link: BaseException | None = error
    while link is not None:
        link.__traceback__ = None
        link = link.__cause__ or link.__context__
    return CarveFailure(question, image, error, prompt)


def _is_out_of_memory(error: Exception) -> bool:
    # torch has no error class for a CPU without memory.
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error)


def _report(results: Iterator[Result], total: int | None, on_progress: OnResult | None) -> Iterator[Result]:
    for done, result in enumerate(results, 1):
        if on_progress is not None:
            on_progress(result, done, total)
        yield result
