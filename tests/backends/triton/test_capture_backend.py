"""Capture by the Triton backend: memory accesses, order of programs, launches, layers, and edge cases."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import triton

from carve_kernels import BackendUnavailable, capture_layers
from carve_kernels import capture as public
from carve_kernels.backends.native.scratch import Memory
from carve_kernels.backends.reference import capture as reference
from carve_kernels.backends.triton import capture, capture_plan
from carve_kernels.types import Capture, CaptureOptions, Layers, Slot
from tests.backends.triton import interpreter
from tests.backends.triton.guard import Guards, guard_allocations
from tests.support.attention import Case, exact, planted, poisoned
from tests.support.tolerances import close, roundings

if not triton.knobs.runtime.interpret:
    pytest.skip("guards and counters want the interpreter", allow_module_level=True)

SCORES, MAP, REREAD = "capture_scores_kernel", "capture_map_kernel", "capture_reread_kernel"
# Three splits of the keys and two blocks of tokens, with padding.
LONG = Case(batch=2, query_heads=4, key_heads=2, rows=2, keys=800, size=32, tokens=300, view="all")


def right(found: Capture, arguments: Any, options: dict[str, Any], heads: str = "mean") -> None:
    exact_arguments, exact_options = exact(arguments, options)
    truth = reference.forward(*exact_arguments, CaptureOptions(**exact_options, heads=heads))  # type: ignore[arg-type]
    own = reference.forward(*arguments, CaptureOptions(**options, heads=heads))  # type: ignore[arg-type]
    for part, mine, exactly in zip(found, own, truth, strict=True):
        close(part, mine, exactly, roundings(arguments[0].shape[3] + 64 + arguments[0].shape[1]))


def spread(tensor: torch.Tensor, factor: int = 3) -> torch.Tensor:
    """The same values with gaps between any two elements."""
    if factor == 1:
        return tensor
    store = torch.full((*tensor.shape, factor), torch.nan if tensor.is_floating_point() else 0).to(tensor.dtype)
    store[..., 1] = tensor
    return store[..., 1]


CASES = {
    "mask": Case(rows=2, keys=301, tokens=29),
    "each head": Case(rows=2, view="head mask"),
    "window, sink, softcap": Case(view="positions", window=23, sink=True, softcap=4.0),
    "several splits and blocks": LONG,
    "many lanes": Case(batch=1, query_heads=28, key_heads=4, rows=9, keys=70, size=72, view="all"),
    "more heads than lanes": Case(batch=1, query_heads=70, key_heads=1, rows=2, keys=40, size=40, view="all"),
    "half": Case(dtype=torch.float16, size=80, view="positions"),
    "brain": Case(dtype=torch.bfloat16, size=96),
}


@pytest.mark.parametrize("spacing", [1, 3])
@pytest.mark.parametrize("name", CASES)
def test_nothing_outside_the_tensors_is_accessed(name: str, spacing: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    heads = "each" if case.view == "head mask" else "mean"
    arguments, options = planted(case)
    guards = Guards()

    def guarded(what: str, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return guards.put(what, spread(value, spacing))

    out = Capture(
        *(guards.put(f"out {part.ndim}", spread(part, spacing), written=True) for part in poisoned(case, heads))
    )
    with monkeypatch.context() as patched:
        guard_allocations(guards, patched)
        capture.forward(
            *[guarded(what, value) for what, value in zip(("query", "key", "tokens"), arguments, strict=True)],
            CaptureOptions(**{what: guarded(what, value) for what, value in options.items()}, heads=heads), out=out,
        )  # fmt: skip
    guards.check()
    right(out, arguments, options, heads)


def test_any_order_of_programs_gives_the_same_bits() -> None:
    arguments, options = planted(LONG)
    wanted = capture.forward(*arguments, CaptureOptions(**options))
    for order in ("reverse", "shuffled"):
        with interpreter.programs_in(order):
            found = capture.forward(*arguments, CaptureOptions(**options))
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, wanted, strict=True))


def test_a_batch_has_the_bits_of_its_rows_alone() -> None:
    (query, key, tokens), options = planted(LONG.but(sink=True))
    whole = capture.forward(query, key, tokens, CaptureOptions(**options))
    for b in range(2):
        alone = capture.forward(query[b : b + 1], key[b : b + 1], tokens[b : b + 1], CaptureOptions(**options))
        assert all(torch.equal(mine[0], theirs[b]) for mine, theirs in zip(alone, whole, strict=True))


def layers_of(case: Case, count: int, **options: Any) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
    made = [planted(case.but(seed=seed))[0] for seed in range(count)]
    return [query for query, _, _ in made], [key for _, key, _ in made], made[0][2]


def slots(case: Case, steps: int, layers: int) -> Capture:
    """Buffers of several steps and layers, with non-dense strides."""
    rows = (steps, layers, case.batch, case.rows)
    return Capture(
        torch.full((layers, steps, case.rows, case.batch, case.tokens, 2), torch.nan)[..., 0].permute(1, 0, 3, 2, 4),
        torch.full(rows, torch.nan), torch.full((*rows, 2), torch.nan)[..., 1],
    )  # fmt: skip


@pytest.mark.parametrize("view", ["all", "positions"])
def test_layers_in_one_call_have_the_bits_of_each_alone_and_two_launches(view: str) -> None:
    case = Case(rows=2, keys=150, tokens=21, view=view, dtype=torch.bfloat16, window=40)
    query, key, tokens = layers_of(case, 6)
    options = planted(case)[1]
    sink = [torch.randn(case.query_heads) for _ in query]
    out = slots(case, steps=3, layers=8)
    with interpreter.traffic() as traffic:
        capture_layers(
            query, key, tokens, step=torch.tensor(1), first=1, out=out, sink=sink, backend="triton", **options
        )
    assert traffic.launches == [SCORES, MAP]
    for index, layer in enumerate(zip(query, key, sink, strict=True), start=1):
        alone = public(*layer[:2], tokens, sink=layer[2], backend="triton", **options)
        for buffer, part in zip(out, alone, strict=True):
            assert torch.equal(buffer[1, index], part)
    written = torch.zeros(3, 8, dtype=torch.bool)
    written[1, 1:7] = True
    for buffer in out:
        assert torch.equal(~buffer.isnan().flatten(2).any(-1), written)


def test_layers_that_are_not_alike_are_launched_by_kind() -> None:
    case = Case(rows=1, view="all", batch=1)
    query, key, tokens = layers_of(case, 4)
    # A sliding layer has fewer keys, and a layer of another cache has other strides.
    key[1] = key[1][:, :, -40:]
    key[3] = key[3].contiguous()
    out = slots(case, steps=1, layers=4)
    with interpreter.traffic() as traffic:
        capture_layers(query, key, tokens, scale=0.125, step=torch.tensor(0), out=out, backend="triton")
    assert traffic.launches == [SCORES, MAP] * 4
    for layer in range(4):
        right(Capture(*(part[0, layer] for part in out)), (query[layer], key[layer], tokens), {"scale": 0.125})


def test_layers_that_cannot_be_captured_in_one_call_return_false() -> None:
    case = Case(rows=1, view="all")
    query, key, tokens = layers_of(case, 2)
    options, step = CaptureOptions(0.125), torch.tensor(0)
    out = slots(case, 1, 2)
    assert capture.forward_layers(Layers(query, key), tokens, options, Slot(out, step))
    double = Layers([query[0], query[1].double()], [key[0], key[1].double()])
    assert not capture.forward_layers(double, tokens, options, Slot(out, step))
    elsewhere = Capture(out.maps.to("meta"), out.mass, out.entropy)
    assert not capture.forward_layers(Layers(query, key), tokens, options, Slot(elsewhere, step))


@pytest.mark.parametrize("step", [-1, 2])
def test_a_step_outside_the_buffers_writes_nothing(step: int) -> None:
    case = Case(rows=2, view="all")
    (query, key, tokens), options = planted(case)
    guards = Guards()
    out = Capture(*(guards.put("out", part) for part in slots(case, steps=2, layers=1)))
    slot = Slot(out, torch.tensor(step))
    assert capture.forward_layers(Layers([query], [key]), tokens, CaptureOptions(**options), slot)
    guards.check()


def test_one_launch_where_the_lse_is_given() -> None:
    arguments, options = planted(LONG)
    query, key, _ = arguments
    logits = query @ key.repeat_interleave(2, 1).mT * options["scale"]
    with interpreter.traffic() as traffic:
        lse = spread(logits.double().logsumexp(-1))
        found = capture.forward(*arguments, CaptureOptions(**options, lse=lse))
    assert traffic.launches == [REREAD]
    right(found, arguments, options)


def test_memory_that_is_given_is_used_and_nothing_else() -> None:
    arguments, options = planted(LONG)
    query, key, tokens = arguments
    sizes: dict[str, int] = dict(layers=1, batch=query.shape[0], query_heads=query.shape[1], key_heads=key.shape[1])
    sizes |= dict(rows=query.shape[2], keys=key.shape[2], size=key.shape[3], tokens=tokens.shape[1], element_bytes=4)
    needs = capture.scratch_needs(query.device, **sizes)
    assert needs.bytes > 0 and needs.tickets > 0
    known = capture.scratch_needs(query.device, **sizes, lse=True)
    assert known.bytes < needs.bytes
    store = torch.full((needs.bytes + 64,), 7, dtype=torch.uint8)
    memory = Memory(store[: needs.bytes], torch.zeros(needs.tickets, dtype=torch.int32))
    layers, asked = Layers.single(query, key, None), CaptureOptions(**options)
    for _ in range(2):
        out = poisoned(LONG)
        assert capture.forward_layers(layers, tokens, asked, Slot(out), None, memory)
        right(out, arguments, options)
        assert not memory.tickets.any() and bool((store[needs.bytes :] == 7).all())
    for little, error, message in (
        (memory._replace(scratch=store[: needs.bytes - 1]), ValueError, f"scratch: expected at least {needs.bytes} by"),
        (memory._replace(scratch=store.int()), TypeError, "scratch: expected contiguous torch.uint8"),
        (memory._replace(tickets=memory.tickets[1:]), ValueError, f"tickets: expected at least {needs.tickets}, got"),
        (memory._replace(tickets=memory.tickets.long()), TypeError, "tickets: expected contiguous torch.int32"),
        (memory._replace(scratch=store[1 : needs.bytes + 1]), ValueError, "scratch: expected 16 bytes of alignment"),
    ):
        with pytest.raises(error, match=message):
            capture.forward_layers(layers, tokens, asked, Slot(out), None, little)


@pytest.mark.parametrize("first, last", [(0, 799), (70, 71), (191, 192), (640, 799), (799, 799)])
def test_scores_between_the_tokens_are_enough(first: int, last: int) -> None:
    arguments, options = planted(LONG)
    query, key, _ = arguments
    tokens = torch.linspace(first, last, 5).round().int().expand(2, 5)
    layers, asked = Layers.single(query, key, None), CaptureOptions(**options)
    sizes: dict[str, int] = dict(layers=1, batch=2, query_heads=4, key_heads=2, rows=2, keys=800, size=32, tokens=5)
    memory = Memory.new(capture.scratch_needs(query.device, **sizes, element_bytes=4), query.device)
    memory.scratch.view(torch.float32).fill_(torch.nan)
    out = poisoned(LONG.but(tokens=5))
    assert capture.forward_layers(layers, tokens, asked, Slot(out), torch.tensor([first, last]), memory)
    right(out, (query, key, tokens), options)


def test_rows_and_layers_are_captured_in_turns_where_their_scores_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(rows=5, keys=150, tokens=21, view="positions", window=40)
    query, key, tokens = layers_of(case, 3)
    options = planted(case)[1]
    whole, parts = slots(case, steps=1, layers=3), slots(case, steps=1, layers=3)
    step = torch.tensor(0)
    capture_layers(query, key, tokens, step=step, out=whole, backend="triton", **options)
    monkeypatch.setattr(capture_plan, "MOST_LINES", 2)
    for cached in (capture_plan.plan, capture_plan.plan_scratch):
        cached.cache_clear()
    try:
        with interpreter.traffic() as traffic:
            capture_layers(query, key, tokens, step=step, out=parts, backend="triton", **options)
    finally:
        for cached in (capture_plan.plan, capture_plan.plan_scratch):
            cached.cache_clear()
    assert traffic.launches == [SCORES, MAP] * 9
    for mine, theirs in zip(parts, whole, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("changes", [{"rows": 0}, {"batch": 0}, {"keys": 0}, {"tokens": 0}, {"rows": 0, "tokens": 0}])
@pytest.mark.parametrize("heads", ["mean", "each"])
def test_empty_inputs_are_served(changes: dict[str, int], heads: str) -> None:
    case = Case(view="all", ragged=False).but(**changes)
    arguments, options = planted(case)
    truth = reference.forward(*arguments, CaptureOptions(**options, heads=heads))  # type: ignore[arg-type]
    found = capture.forward(*arguments, CaptureOptions(**options, heads=heads))  # type: ignore[arg-type]
    for part, exactly in zip(found, truth, strict=True):
        assert part.dtype == torch.float32 and torch.equal(part, exactly) and not part.any()
    out = slots(case, steps=1, layers=2)
    capture_layers(
        *([one, one] for one in arguments[:2]), arguments[2], step=torch.tensor(0), out=out, backend="triton", **options
    )
    assert not any(part.any() for part in out)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_tokens_outside_the_keys_are_padding(dtype: torch.dtype) -> None:
    (query, key, tokens), options = planted(Case(view="all", ragged=False))
    stray = tokens.to(dtype).clone()
    stray[:, 1], stray[:, 4], stray[0, 7] = 77, torch.iinfo(dtype).max, torch.iinfo(dtype).min
    found = capture.forward(query, key, stray, CaptureOptions(**options))
    assert not found.maps[..., [1, 4]].any()
    right(found, (query, key, stray), options)


@pytest.mark.parametrize("lse", [False, True])
def test_a_nan_affects_what_it_does_in_the_reference(lse: bool) -> None:
    case = Case(batch=1, rows=3, view="positions")
    (query, key, tokens), options = planted(case)
    key, options["positions"] = key.clone(), torch.tensor([[20, 50, 40]])
    key[0, 1, 45] = torch.nan
    tokens[0, 3] = 45
    options["lse"] = torch.ones(1, case.query_heads, case.rows) if lse else None
    for heads in ("mean", "each"):
        truth = reference.forward(query, key, tokens, CaptureOptions(**options, heads=heads))  # type: ignore[arg-type]
        found = capture.forward(query, key, tokens, CaptureOptions(**options, heads=heads))  # type: ignore[arg-type]
        assert truth.mass.isnan().tolist() == [[False, True, False]]
        for part, right_part in zip(found, truth, strict=True):
            assert torch.equal(part.isnan(), right_part.isnan())


@pytest.mark.parametrize("last", [-(2**40), -1, 10**6, 2**40])
def test_positions_outside_the_keys(last: int) -> None:
    case = Case(view="positions", rows=2)
    arguments, options = planted(case)
    options["positions"][0, 0] = last
    right(capture.forward(*arguments, CaptureOptions(**options)), arguments, options)
    options["window"] = 40
    right(capture.forward(*arguments, CaptureOptions(**options)), arguments, options)
    options["window"] = 2**70
    right(capture.forward(*arguments, CaptureOptions(**options)), arguments, {**options, "window": 2**50})


def test_offsets_of_tensors_beyond_two_thousand_million_elements() -> None:
    case = Case(batch=2, query_heads=2, key_heads=2, rows=2, keys=9, tokens=5, size=32, dtype=torch.float16)
    arguments, options = planted(case)

    def far(tensor: torch.Tensor) -> torch.Tensor:
        """The tensor with more than 2^31 elements between its ends; unused memory costs nothing."""
        # The small terms separate elements whose large terms coincide.
        strides = (2**31 + 4096, 2**30 + 1024, 2**28 + 128, 1)
        if tensor.ndim < 4:
            strides = (2**31 + 64, 2**28 + 8, 2**26 + 1)[: tensor.ndim]
        extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, strides, strict=True))
        return torch.empty(extent, dtype=tensor.dtype).as_strided(tensor.shape, strides).copy_(tensor)

    out = Capture(*(far(part) for part in poisoned(case)))
    query, key, tokens = (far(part) for part in arguments)
    mask = far(options["mask"])
    with interpreter.overflows_are_errors():
        capture.forward(query, key, tokens, CaptureOptions(options["scale"], mask), out=out)
    right(out, arguments, options)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"query": torch.ones(1, 2, 1, 8).double(), "key": torch.ones(1, 2, 3, 8).double()},
            "float64, this backend serves",
        ),
        ({"query": torch.ones(1, 2, 1, 264), "key": torch.ones(1, 2, 3, 264)}, "heads of size 264"),
        (
            {name: torch.ones(1, 2, 1, 8).expand(65536, -1, -1, -1) for name in ("query", "key")}
            | {"tokens": torch.zeros(65536, 1, dtype=torch.int32)},
            "a batch of 65536",
        ),
        ({"out": Capture(torch.ones(1, 1, 1).double(), torch.ones(1, 1), torch.ones(1, 1))}, "out is float64"),
    ],
)
def test_unsupported_arguments_have_a_reason(changes: dict[str, Any], reason: str) -> None:
    arguments = {"query": torch.ones(1, 2, 1, 8), "key": torch.ones(1, 2, 3, 8), "tokens": torch.tensor([[0]])}
    with pytest.raises(BackendUnavailable, match=reason):
        public(**{**arguments, **changes}, scale=1.0, backend="triton")
