"""The backward of a capture of four rows: the kernel against plain torch and autograd, and its peak memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from benchmarks.support.answers import WrongAnswer
from benchmarks.support.lines import Goal, Line, line, over
from benchmarks.support.memory import peak_of_tensors
from benchmarks.support.timing import paired, warm
from carve_kernels import capture
from carve_kernels.backends.cpu import capture as cpu_capture
from carve_kernels.backends.cpu import capture_backward as cpu
from carve_kernels.backends.native import extension
from carve_kernels.backends.reference import capture_backward as reference
from carve_kernels.selfcheck.timing import Run, Spread
from carve_kernels.types import CaptureOptions, Given

KERNEL, TORCH, AUTOGRAD = "cpu", "plain torch", "autograd of eager"
LENGTHS, QUICK = (2048, 8192), (128, 256)
HEADS, KEY_HEADS, SIZE, ROWS = 28, 4, 128, 4
MIB = 2**20
# Of the norm of a gradient, and of its rounding to bfloat16.
_TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}


def measure(lengths: Sequence[int], *, budget: float, advance: Callable[[str], None]) -> Iterator[Line]:
    """Seconds by dtype and number of keys, then the peaks, which are exact."""
    if reason := extension.unavailable():
        raise WrongAnswer(f"{KERNEL}: {reason}")
    for keys in lengths:
        for dtype in ("float32", "bfloat16"):
            yield _seconds(keys, dtype, budget)
            advance(f"backward, {keys} keys in {dtype}")
    first: int | None = None
    for keys in lengths:
        entry, first = _memory(keys, first)
        yield entry
        advance(f"memory, {keys} keys")


def _problem(keys: int, dtype: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, CaptureOptions, Given]:
    """The last rows of a prompt whose image has half of its tokens, and gradients of all parts of their capture."""
    random = torch.Generator().manual_seed(0)
    kind = getattr(torch, dtype)
    query = torch.randn(1, HEADS, ROWS, SIZE, generator=random).to(kind)
    key = torch.randn(1, KEY_HEADS, keys, SIZE, generator=random).to(kind)
    tokens = torch.arange(keys // 32, keys // 32 + keys // 2, dtype=torch.int32)[None]
    positions = torch.arange(keys - ROWS, keys)[None]
    given = Given(*(torch.randn(shape, generator=random) for shape in ((1, ROWS, keys // 2), (1, ROWS), (1, ROWS))))
    return query, key, tokens, CaptureOptions(SIZE**-0.5, positions=positions), given


def _eager(keys: int, dtype: str) -> Callable[[], tuple[torch.Tensor, ...]]:
    """The backward of softmax(scores) at the tokens, their mean, mass and entropy; its graph is made once."""
    query, key, tokens, options, given = _problem(keys, dtype)
    query, key = query.float().requires_grad_(), key.float().requires_grad_()
    scores = options.scale * query @ key.repeat_interleave(HEADS // KEY_HEADS, 1).mT
    hidden = torch.arange(keys) > options.positions[:, None, :, None]  # type: ignore[index]
    mean = scores.masked_fill(hidden, -torch.inf).softmax(-1)[..., tokens[0].long()].mean(1)
    mass = mean.sum(-1)
    share = mean / mass[..., None]
    entropy = -(share * share.log()).sum(-1) / torch.tensor(float(tokens.shape[1])).log()
    parts, of_parts = (mean, mass, entropy), [each for each in given if each is not None]
    return lambda: torch.autograd.grad(parts, (query, key), of_parts, retain_graph=True)


def _seconds(keys: int, dtype: str, budget: float) -> Line:
    query, key, tokens, options, given = _problem(keys, dtype)
    if reason := cpu_capture.supports(query, key):
        raise WrongAnswer(f"{KERNEL}: {reason}")
    runs: dict[str, Run] = {
        KERNEL: lambda: cpu.backward(query, key, tokens, options, given),
        TORCH: lambda: reference.backward(query, key, tokens, options, given),
        AUTOGRAD: _eager(keys, dtype),
    }
    truth = reference.backward(query.double(), key.double(), tokens, options, given)[:2]
    for name, run in runs.items():
        for part, found, expected in zip(("query", "key"), run(), truth, strict=False):
            _check(f"{name}, {keys} keys in {dtype}: the gradient of the {part}", found, expected, _TOLERANCE[dtype])
    seconds = paired(runs, rounds=31, before=warm, budget=budget)
    labels = {"keys": keys, "rows x heads": f"{ROWS} x {HEADS}", "dtype": dtype, "threads": torch.get_num_threads()}
    return line("backward: ms, and times cpu", labels, over(seconds, KERNEL), [Goal(TORCH, 1.3)], seconds=seconds)


def _check(name: str, found: torch.Tensor, expected: torch.Tensor | None, tolerance: float) -> None:
    if expected is None or not bool(expected.isfinite().all()) or not bool(expected.any()):
        raise WrongAnswer(f"{name}: expected a finite truth that is not 0")
    error = float((found.double() - expected).norm() / expected.norm())
    if not error <= tolerance:
        raise WrongAnswer(f"{name}: expected an error of at most {tolerance:g} of its norm, got {error:.1e}")


def _memory(keys: int, first: int | None) -> tuple[Line, int]:
    """The peak of a capture and its backward above the inputs; `first` is that of the least number of keys."""
    query, key, tokens, options, _ = _problem(keys, "float32")
    query, key = query.requires_grad_(), key.requires_grad_()

    def run() -> None:
        maps, mass, entropy = capture(query, key, tokens, scale=options.scale, positions=options.positions)
        (maps.square().sum() + mass.sum() + entropy.sum()).backward()

    run()
    query.grad = key.grad = None
    peak = peak_of_tensors(run)
    itself = 4 * (query.numel() + key.numel())
    findings = {
        "peak": peak,
        "beyond the gradients": peak - itself,
        "rows x heads x S x 4": 4 * ROWS * HEADS * keys,
        "S x S of one head": 4 * keys**2,
    }
    ratios = {name: Spread.of([value / MIB]) for name, value in findings.items()}
    goals = [Goal("beyond the gradients", 6 * 4 * ROWS * HEADS * keys / MIB + 2, most=True)]
    if first is not None:
        ratios["peak, times the first"] = Spread.of([peak / first])
    return line("peak memory of a capture and its backward: MiB", {"keys": keys}, ratios, goals), first or peak
