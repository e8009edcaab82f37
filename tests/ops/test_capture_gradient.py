"""Gradients of a capture: gradcheck on the reference, autograd of a textbook attention, every backend, and memory."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal

import pytest
import torch

from benchmarks.support.memory import allocations, peak_of_tensors
from carve_kernels import capture, explain
from carve_kernels.backends import BACKENDS as ALL_BACKENDS
from carve_kernels.backends import BACKWARD
from carve_kernels.backends.reference import capture_backward
from carve_kernels.selfcheck.moving import move
from carve_kernels.types import Capture
from tests.support.attention import Case, exact, planted
from tests.support.capture_backends import BACKENDS, entered

Heads = Literal["mean", "each"]
SMALL = Case(query_heads=4, key_heads=2, rows=3, keys=11, size=5, tokens=6, gain=1.0)
CASES = {
    "mask": SMALL,
    "all": SMALL.but(view="all", batch=1),
    "positions": SMALL.but(view="positions"),
    "window": SMALL.but(view="positions", window=4),
    "head mask": SMALL.but(view="head mask"),
    "softcap": SMALL.but(softcap=1.5),
    "sink": SMALL.but(sink=True),
    "sink, softcap, window": SMALL.but(sink=True, softcap=2.0, view="positions", window=7),
    "no groups": SMALL.but(query_heads=3, key_heads=3),
    "one token": SMALL.but(tokens=1, ragged=False),
    "no tokens": SMALL.but(tokens=0, ragged=False),
    "no keys": SMALL.but(keys=0, view="all", ragged=False),
}
# The function itself: in a test for a GPU, `capture` moves detached copies there.
in_place = capture
# Several blocks of keys, and several parts of the rows.
LONG = Case(batch=1, rows=5, keys=2300, tokens=300, query_heads=2, key_heads=1, size=32, gain=1.0)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with entered(request.param) as backend:
        yield backend


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    """Where the backend of a test runs."""
    return "cuda" if str(request.node.callspec.params["backend"]).endswith("on gpu") else "cpu"


def arguments_of(case: Case, *, double: bool = True, device: str = "cpu") -> tuple[list[torch.Tensor], dict[str, Any]]:
    arguments, options = move(planted(case), device)
    if double:
        arguments, options = exact(arguments, options)
    query, key, tokens = arguments
    inputs = [query.detach().requires_grad_(), key.detach().requires_grad_(), tokens]
    if options.get("sink") is not None:
        options["sink"] = options["sink"].detach().requires_grad_()
    return inputs, options


def textbook(query: torch.Tensor, key: torch.Tensor, tokens: torch.Tensor, heads: Heads, **options: Any) -> Capture:
    """The capture by softmax over masked logits and one gather, differentiated by autograd."""
    group, keys = query.shape[1] // key.shape[1], key.shape[2]
    logits = options["scale"] * query @ key.nan_to_num().repeat_interleave(group, 1).mT
    if options.get("softcap"):
        logits = options["softcap"] * torch.tanh(logits / options["softcap"])
    visible = torch.ones_like(logits, dtype=torch.bool) if options.get("mask") is None else options["mask"]
    if options.get("positions") is not None:
        last, column = options["positions"][:, None, :, None], torch.arange(keys)
        visible = (column <= last) & (column > last - (options.get("window") or keys))
    logits = logits.masked_fill(~visible, -1e30)
    if options.get("sink") is not None:
        logits = torch.cat([logits, options["sink"].view(1, -1, 1, 1).expand(*logits.shape[:-1], 1)], -1)
    used = ((tokens >= 0) & (tokens < keys))[:, None, None]
    shares = logits.softmax(-1).masked_fill(~visible.any(-1, keepdim=True), 0.0)
    index = tokens.clamp(min=0).long()[:, None, None].expand(*shares.shape[:-1], -1)
    picked = shares.gather(-1, index) * used
    mean = picked.mean(1)
    mass = mean.sum(-1)
    share = mean / mass.masked_fill(mass == 0, 1.0)[..., None]
    spread = -(share * share.clamp(min=1e-300).log()).sum(-1)
    count = used[:, 0].sum(-1)
    entropy = torch.where(count > 1, spread / count.clamp(min=2).double().log(), 0.0)
    return Capture(mean if heads == "mean" else picked, mass, entropy)


def loss(captured: Capture, part: int | None = None) -> torch.Tensor:
    """A sum of the parts (or of one of them) with planted weights."""
    random = torch.Generator().manual_seed(5)
    weights = [torch.rand(each.shape, generator=random, dtype=torch.float64) for each in captured]
    sums = [(each * weight.to(each.device)).sum() for each, weight in zip(captured, weights, strict=True)]
    return sum(sums) if part is None else sums[part]  # type: ignore[return-value]


def gradients(call: Callable[..., Capture], inputs: Any, options: Any, part: int | None = None) -> list[torch.Tensor]:
    wanted = [inputs[0], inputs[1], *([options["sink"]] if options.get("sink") is not None else [])]
    found = torch.autograd.grad(loss(call(*inputs, **options), part), wanted, allow_unused=True)
    return [torch.zeros_like(each) if one is None else one for one, each in zip(found, wanted, strict=True)]


@pytest.mark.parametrize("heads", ["mean", "each"])
@pytest.mark.parametrize("name", ["mask", "head mask", "sink, softcap, window"])
def test_gradcheck(name: str, heads: Heads) -> None:
    (query, key, tokens), options = arguments_of(CASES[name].but(keys=7, size=3, rows=2, tokens=4))
    sink = options.pop("sink", None)

    def run(*tensors: torch.Tensor) -> Capture:
        given: dict[str, Any] = {"sink": tensors[2]} if len(tensors) > 2 else {}
        return capture(tensors[0], tensors[1], tokens, **options, **given, heads=heads, backend="reference")

    # Numerical differences want keys without NaN at their hidden places.
    key = key.nan_to_num().detach().requires_grad_()
    assert torch.autograd.gradcheck(run, (query, key) if sink is None else (query, key, sink))


@pytest.mark.parametrize("part", [None, 0, 1, 2])
@pytest.mark.parametrize("heads", ["mean", "each"])
@pytest.mark.parametrize("name", CASES)
def test_the_reference_is_autograd_of_the_textbook(name: str, heads: Heads, part: int | None) -> None:
    inputs, options = arguments_of(CASES[name])
    if name == "no keys":
        assert not any(each.any() for each in gradients(capture, inputs, {**options, "heads": heads}, part))
        return
    expected = gradients(functools.partial(textbook, heads=heads), inputs, options, part)
    found = gradients(functools.partial(capture, heads=heads, backend="reference"), inputs, options, part)
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-13)
    assert name == "no tokens" or (part == 2 and name == "one token") or bool(found[0].any())


@pytest.mark.parametrize(
    ("name", "dtype", "heads"),
    [
        ("mask", torch.float32, "mean"),
        ("sink, softcap, window", torch.float32, "each"),
        ("positions", torch.bfloat16, "mean"),
        ("head mask", torch.float16, "each"),
    ],
)
def test_a_backend_has_the_gradients_of_the_reference(
    backend: str, device: str, name: str, dtype: torch.dtype, heads: Heads
) -> None:
    case = CASES[name].but(dtype=dtype, size=32)
    inputs, options = arguments_of(case, double=False, device=device)
    found = gradients(functools.partial(in_place, heads=heads, backend=backend), inputs, options)
    expected = gradients(functools.partial(textbook, heads=heads), *arguments_of(case))
    eps = torch.finfo(dtype).eps
    for one, other, given in zip(found, expected, [*inputs[:2], options.get("sink")], strict=False):
        assert one.dtype == given.dtype and one.shape == given.shape  # type: ignore[union-attr]
        assert float((one.cpu().double() - other).norm()) <= max(8 * eps, 2e-5) * float(other.norm()) + 1e-12


@pytest.mark.parametrize("heads", ["mean", "each"])
@pytest.mark.parametrize("scores", [1, 5000, 2**22])
def test_any_division_of_the_rows(scores: int, heads: Heads, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture_backward, "_SCORES", scores)
    for case in (LONG, LONG.but(view="positions", window=1500, sink=True, softcap=3.0), LONG.but(view="head mask")):
        inputs, options = arguments_of(case)
        expected = gradients(functools.partial(textbook, heads=heads), inputs, options)
        for one, other in zip(gradients(capture, inputs, {**options, "heads": heads}), expected, strict=True):
            assert torch.allclose(one, other, rtol=1e-9, atol=1e-13)


def test_a_known_log_sum_exp_changes_with_the_query() -> None:
    inputs, options = arguments_of(SMALL.but(view="all", sink=True))
    query, key, _ = inputs
    logits = options["scale"] * query.detach() @ key.detach().repeat_interleave(2, 1).mT
    sink = options["sink"].detach().view(1, -1, 1, 1).expand(*logits.shape[:-1], 1)
    options["lse"] = torch.cat([logits, sink], -1).logsumexp(-1)
    expected = gradients(capture, inputs, {**options, "lse": None})
    for one, other in zip(gradients(capture, inputs, options), expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-13)


def test_rows_and_keys_without_a_part_have_no_gradient() -> None:
    inputs, options = arguments_of(SMALL)
    options["mask"][0, :, 1] = False
    options["mask"][..., 4] = False
    inputs[1].data[:, :, 4] = float("nan")
    query, key = gradients(capture, inputs, options)
    assert not query[0, :, 1].any() and query[0, :, 0].any() and not key[:, :, 4].any()
    assert bool(query.isfinite().all()) and bool(key.isfinite().all())


def test_tokens_that_are_listed_twice_count_twice() -> None:
    inputs, options = arguments_of(SMALL.but(view="all", ragged=False))
    inputs[2] = inputs[2][:, [0, 0, 0, 3]]
    expected = gradients(functools.partial(textbook, heads="mean"), inputs, options)
    for one, other in zip(gradients(capture, inputs, options), expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("which", ["query", "key"])
def test_only_what_requires_a_gradient_has_one(which: str) -> None:
    (query, key, tokens), options = arguments_of(SMALL)
    frozen = key if which == "query" else query
    frozen.requires_grad_(False)
    loss(capture(query, key, tokens, **options)).backward()
    assert frozen.grad is None and (query if which == "query" else key).grad is not None


def test_gradients_reach_given_outputs() -> None:
    inputs, options = arguments_of(SMALL, double=False)
    out = Capture(torch.zeros(2, 3, 6), torch.zeros(2, 3), torch.zeros(2, 3))
    found = gradients(functools.partial(capture, out=out), inputs, options)
    for one, other in zip(found, gradients(capture, inputs, options), strict=True):
        assert torch.equal(one, other)


def test_gradients_of_gradients_are_refused() -> None:
    inputs, options = arguments_of(SMALL)
    (first,) = torch.autograd.grad(loss(capture(*inputs, **options)), inputs[0], create_graph=True)
    assert torch.equal(first, gradients(capture, inputs, options)[0])
    with pytest.raises(RuntimeError, match="capture: expected to be differentiated once"):
        first.sum().backward()


def test_keys_that_were_overwritten_are_noticed() -> None:
    inputs, options = arguments_of(SMALL)
    keys = inputs[1] * 1
    captured = capture(inputs[0], keys, inputs[2], **options)
    with torch.no_grad():
        keys[:, :, 0] = 0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss(captured).backward()


def test_without_gradients_nothing_is_kept(backend: str, device: str) -> None:
    inputs, options = arguments_of(SMALL.but(size=32), double=False, device=device)
    plain = [each.detach() for each in inputs]
    kept: list[Any] = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda each: each):
        found = in_place(*plain, **options, backend=backend)
        with torch.no_grad():
            under = in_place(*inputs, **options, backend=backend)
        assert not kept and not any(part.requires_grad for part in (*found, *under))
        with_graph = in_place(*inputs, **options, backend=backend)
    # The query and the key themselves, tokens, and the mask: no copies.
    memory = {each.untyped_storage().data_ptr() for each in (*inputs, options["mask"])}
    assert kept and {each.untyped_storage().data_ptr() for each in kept} <= memory
    for parts in zip(found, under, with_graph, strict=True):
        assert torch.equal(parts[0], parts[1]) and torch.equal(parts[0], parts[2])


def test_a_call_without_gradients_costs_what_it_did() -> None:
    inputs, options = arguments_of(SMALL.but(size=32), double=False)
    plain = [each.detach() for each in inputs]
    with torch.no_grad():
        under = allocations(lambda: capture(*inputs, **options))
    assert allocations(lambda: capture(*plain, **options)) == under


def peak(keys: int) -> int:
    """The peak of four rows' capture and backward, above the inputs and the gradients of the query and the key."""
    case = Case(batch=1, query_heads=8, key_heads=2, rows=4, keys=keys, size=64, tokens=576, view="positions")
    inputs, options = arguments_of(case, double=False)

    def run() -> None:
        loss(capture(*inputs, **options)).backward()

    return peak_of_tensors(run) - sum(each.numel() * each.element_size() for each in inputs[:2])


def test_memory_grows_with_the_keys() -> None:
    """Below one array of rows x S for each of six, and far below S x S."""
    peaks = {keys: peak(keys) for keys in (2048, 8192)}
    for keys, found in peaks.items():
        assert found <= 6 * 8 * 4 * keys * 4 + 2**21 < 8 * keys**2
    assert peaks[8192] <= 4.5 * peaks[2048]


def test_explain_names_the_backward_of_every_backend() -> None:
    assert set(BACKWARD) == set(ALL_BACKENDS)
    (line,) = (line for line in explain().splitlines() if line.startswith("gradients of capture"))
    for name, chosen in BACKWARD.items():
        assert f"after {name} by {chosen}" in line
