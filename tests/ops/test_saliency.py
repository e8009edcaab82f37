"""Saliency: to the bit what its three stages give, by every backend; one operator that a graph records; its errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch

from carve_kernels import BackendUnavailable, backends, capture, capture_layers, contrast, regions, saliency
from carve_kernels.ops.saliency import Saliency
from carve_kernels.selfcheck.moving import move
from carve_kernels.types import Capture
from tests.emulator import emulator
from tests.support.attention import Case, planted
from tests.support.graphs import FakeGraph, Graphs, Operators
from tests.support.planted_maps import maps

CASE = Case(batch=1, rows=1, keys=61, tokens=12, query_heads=6, key_heads=2, size=32, view="all", ragged=False)
GRID, SIZE = (3, 4), (25, 36)
LAYERS = 3
WANTED = {"keep": 0.3, "top": 2}
NAMES = ("reference", "cpu", "cuda", "triton")


@pytest.fixture(params=NAMES)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with ExitStack() as stack:
        if request.param == "cuda":
            for library in ("saliency", "capture", "contrast", "regions"):
                stack.enter_context(emulator.serving(library))
        if reason := backends.why_not("capture", request.param, torch.device("cpu")):
            pytest.skip(reason)
        yield request.param


def problem(case: Case = CASE, layers: int = LAYERS, **options: Any) -> tuple[list[Any], dict[str, Any]]:
    """Arguments of `saliency` for several layers with the options of the first."""
    given = [planted(case.but(seed=case.seed + layer)) for layer in range(layers)]
    (_, _, tokens), shared = given[0]
    shared = {name: value for name, value in shared.items() if value is not None}
    if case.sink:
        shared["sink"] = [each["sink"] for _, each in given]
    general = maps((1, case.tokens), layers=layers, steps=1)[1]
    queries, keys = ([arguments[index] for arguments, _ in given] for index in (0, 1))
    return [queries, keys, tokens, general, GRID, SIZE], shared | options


def stages(backend: str, arguments: list[Any], options: dict[str, Any]) -> tuple[Capture, Any, Any]:
    """The three calls that a saliency equals."""
    queries, keys, tokens, general, grid, size = arguments
    ours = ("lam", "layer_weights", "normalize", "regions", "backend")
    captured = {name: value for name, value in options.items() if name not in ours}
    shape = (1, len(queries), 1, 1)
    buffers = Capture(torch.full((*shape, tokens.shape[1]), torch.nan), *(torch.full(shape, torch.nan) for _ in "me"))
    capture_layers(queries, keys, tokens, **captured, step=torch.tensor(0), out=buffers, backend=backend)
    shared = {name: options[name] for name in ("lam", "layer_weights", "normalize") if name in options}
    pixels = contrast(buffers.maps[0, :, 0], general, grid, size, **shared, backend=backend)
    wanted = options.get("regions")
    found = regions(pixels, **wanted, backend=backend) if wanted else None
    return Capture(*(part[0, :, 0, 0] for part in buffers)), pixels, found


def assert_equal(result: Saliency, wanted: tuple[Capture, Any, Any]) -> None:
    captured, pixels, found = wanted
    for part, true in zip((result.maps, result.mass, result.entropy), captured, strict=True):
        assert torch.equal(part, true) and bool(part.isfinite().all())
    pairs = [(result.pixels, pixels)] if isinstance(pixels, torch.Tensor) else zip(result.pixels, pixels, strict=True)
    assert all(torch.equal(mine, true) and mine.max() > mine.median() for mine, true in pairs)
    assert result.has_regions == (found is not None)
    if found is None:
        return
    ours = result.regions()
    assert ours.box == found.box and ours.reason == found.reason and found.reason is None
    for name in ("mask", "boxes", "scores"):
        assert torch.equal(getattr(ours, name), getattr(found, name)), name


CASES = {
    "float lam": (CASE, {"lam": 1e-8}),
    "half": (CASE.but(dtype=torch.bfloat16, size=64), {"normalize": "sum"}),
    "one layer": (CASE, {}),
    "mask": (CASE.but(view="mask"), {"layer_weights": [1.0, 0.0, 2.5], "lam": 0.01}),
    "positions": (CASE.but(view="positions", window=40), {"normalize": "max"}),
    "sinks": (CASE.but(sink=True, softcap=3.0), {"normalize": "minmax"}),
}


@pytest.mark.parametrize("name", CASES)
def test_saliency_is_its_three_stages_to_the_bit(backend: str, name: str) -> None:
    if backend == "triton" and name not in ("float lam", "positions"):
        pytest.skip("its interpreter takes a second a case")
    case, options = CASES[name]
    arguments, options = problem(case, 1 if name == "one layer" else LAYERS, **options)
    if backend != "triton":
        options["regions"] = WANTED
    wanted = stages(backend, arguments, options)
    assert_equal(saliency(*arguments, **options, backend=backend), wanted)


def test_one_tensor_is_one_layer_and_a_general_map_may_have_two_dimensions() -> None:
    (queries, keys, tokens, general, grid, size), options = problem(layers=1)
    wanted = saliency(queries, keys, tokens, general, grid, size, **options)
    found = saliency(queries[0], keys[0], tokens, general[:, 0], grid, size, **options)
    assert torch.equal(found.pixels, wanted.pixels)
    captured = capture(queries[0], keys[0], tokens, **options)
    assert torch.equal(found.maps, captured.maps[0]) and torch.equal(found.mass, captured.mass[0])


def test_several_views_are_a_list(backend: str) -> None:
    arguments, options = problem()
    arguments[4:] = [[(2, 4), (2, 2)], [(13, 20), (7, 5)]]
    found = saliency(*arguments, **options, backend=backend)
    assert isinstance(found.pixels, list)
    assert_equal(found, stages(backend, arguments, options))


def test_layers_of_several_shapes_are_captured_one_after_the_other() -> None:
    arguments, options = problem()
    other, _ = problem(CASE.but(keys=40))
    arguments[0][1], arguments[1][1], arguments[2] = other[0][1], other[1][1], other[2]
    assert_equal(saliency(*arguments, **options), stages("auto", arguments, options))


@pytest.mark.parametrize(
    "selected",
    [
        None,
        WANTED,
        {"keep": 0.2, "floor": 3, "connectivity": 8, "score": "mean"},
        {"keep": 0.3, "min_size": 20},
    ],
)
def test_into_given_memory_it_is_one_operator_without_memory(backend: str, selected: Any) -> None:
    if backend in ("reference", "triton"):
        pytest.skip("these run their stages in Python")
    (first, options), (second, _) = problem(), problem(CASE.but(seed=9))
    # A copy of general maps that are not contiguous would be an operator more.
    first[3], second[3] = first[3].contiguous(), second[3].contiguous()
    options |= {"regions": selected, "backend": backend}
    memory = saliency(*first, **options)
    before = memory.pixels.clone()
    with Operators() as seen:
        found = saliency(*second, **options, out=memory, check=False)
    # Weights are listed on the host.
    views = ("lift_fresh", "detach", "slice", "select", "unsqueeze", "view", "alias", "expand")
    assert [name for name in seen.names if name.split(".")[1] not in views and "new_empty" not in name] == [
        f"{'carve_emulated' if backend == 'cuda' else 'carve_kernels'}.saliency.default"
    ]
    assert seen.left() == []
    assert found is memory and not torch.equal(before, memory.pixels)
    assert_equal(memory, stages(backend, second, options))


def test_a_graph_records_it_and_replays_it_for_every_token(backend: str) -> None:
    if backend in ("reference", "triton"):
        pytest.skip("these run their stages in Python")
    arguments, options = problem(regions=WANTED, backend=backend)
    memory = saliency(*arguments, **options)
    with FakeGraph() as graph:
        saliency(*arguments, **options, out=memory, check=False)
    for seed in (11, 12):
        newer, _ = problem(CASE.but(seed=seed))
        for old, new in zip((*arguments[0], *arguments[1]), (*newer[0], *newer[1]), strict=True):
            old.copy_(new)
        graph.replay()
        assert_equal(memory, stages(backend, arguments, options))


def test_fewer_keys_fit_into_memory_and_more_do_not() -> None:
    with emulator.serving("saliency"):
        arguments, options = problem(CASE.but(keys=700, dtype=torch.bfloat16, size=64), backend="cuda")
        memory = saliency(*arguments, **options)
        shorter = [*arguments]
        shorter[1] = [key[:, :, :640] for key in arguments[1]]
        shorter[2] = arguments[2].clamp(max=639)
        wanted = saliency(*shorter, **options)
        assert torch.equal(saliency(*shorter, **options, out=memory).pixels, wanted.pixels)
        longer, _ = problem(CASE.but(keys=9000, dtype=torch.bfloat16, size=64))
        with pytest.raises(ValueError, match="out: expected the saliency of a call with as many keys, whose scratch"):
            saliency(*longer, **options, out=memory)


@pytest.mark.parametrize("order", emulator.ORDERS)
def test_any_order_of_threads_gives_the_same_bits(order: str) -> None:
    with emulator.serving("saliency"):
        arguments, options = problem(regions=WANTED, backend="cuda")
        wanted = saliency(*arguments, **options)
        with emulator.running("saliency", order, resident=5, seed=3):
            found = saliency(*arguments, **options)
    assert torch.equal(found.pixels, wanted.pixels) and torch.equal(found.regions().mask, wanted.regions().mask)


def test_every_launch_that_fails_is_an_error_with_its_name() -> None:
    with emulator.serving("saliency"):
        arguments, options = problem(regions=WANTED, backend="cuda")
        emulator.counters("saliency")
        saliency(*arguments, **options)
        launches = emulator.counters("saliency").launches
        failed = 0
        for fail in range(1, 3 * launches):
            try:
                with emulator.running("saliency", fail=fail):
                    saliency(*arguments, **options)
            except RuntimeError as error:
                assert "planted failure" in str(error)
                failed += 1
        assert failed >= launches


def test_compiled_it_is_one_operator_with_the_same_bits() -> None:
    torch._dynamo.reset()
    arguments, options = problem(regions=WANTED)
    wanted = saliency(*arguments, **options)

    def step(queries: list[Any], keys: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
        found = saliency(queries, keys, *arguments[2:], **options, check=False)
        return found.pixels * 2, found.buffers.regions.mask

    pixels, mask = torch.compile(step, fullgraph=True, backend="aot_eager")(*arguments[:2])
    assert torch.equal(pixels, wanted.pixels * 2) and torch.equal(mask, wanted.regions().mask)


def test_no_gradient_flows() -> None:
    arguments, options = problem()
    wanted = saliency(*arguments, **options)
    arguments[0] = [query.clone().requires_grad_() for query in arguments[0]]
    arguments[3] = arguments[3].clone().requires_grad_()
    found = saliency(*arguments, **options)
    assert torch.equal(found.pixels, wanted.pixels) and not found.pixels.requires_grad


def test_a_query_in_float64_is_served_by_the_reference() -> None:
    arguments, options = problem()
    wanted = saliency(*arguments, **options)
    doubled = [[part.double() for part in parts] for parts in arguments[:2]] + arguments[2:]
    torch.testing.assert_close(saliency(*doubled, **options).pixels, wanted.pixels)


def replaced(**changes: Any) -> tuple[list[Any], dict[str, Any]]:
    arguments, options = problem()
    named = dict(zip(("query", "key", "tokens", "general", "grid", "size"), arguments, strict=True)) | options
    named |= {name: value(named[name]) if callable(value) else value for name, value in changes.items()}
    return [named.pop(name) for name in ("query", "key", "tokens", "general", "grid", "size")], named


def nan_key(keys: list[torch.Tensor]) -> list[torch.Tensor]:
    keys[1] = keys[1].clone()
    keys[1][0, 0, 3] = torch.nan
    return keys


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"query": 3}, TypeError, "query: expected a tensor or one for each layer, got int 3"),
        ({"query": []}, ValueError, "query, key, sink: expected one entry a layer, got 0"),
        ({"key": lambda keys: keys[:2]}, ValueError, "query, key, sink: expected one entry a layer"),
        ({"query": lambda queries: [one.expand(2, -1, -1, -1) for one in queries]}, ValueError, "one row of the batch"),
        ({"query": lambda queries: [one.expand(-1, -1, 2, -1) for one in queries]}, ValueError, "slice the one you"),
        ({"query": lambda queries: [one[0] for one in queries]}, ValueError, r"query: expected shape \[1, A, 1, D\]"),
        ({"key": lambda keys: [one.double() for one in keys]}, TypeError, "key: expected dtype"),
        ({"tokens": lambda tokens: tokens.repeat(2, 1)}, ValueError, "tokens: expected shape"),
        ({"tokens": lambda tokens: tokens[0]}, ValueError, "tokens: expected shape"),
        ({"tokens": lambda tokens: tokens + 60}, ValueError, "tokens: expected columns from 0 to 60"),
        ({"general": lambda general: general[:2]}, ValueError, r"general: expected shape \[3, 12\]"),
        ({"general": lambda general: general.repeat(1, 2, 1)}, ValueError, "general: expected the map of one step"),
        ({"general": lambda general: general.double()}, TypeError, "general: expected dtype torch.float32"),
        ({"general": lambda general: -general}, ValueError, "general: expected finite values of at least 0"),
        ({"general": lambda general: general.to("meta")}, ValueError, "general: expected a tensor on cpu"),
        ({"grid": (4, 4)}, ValueError, "grid: expected 12 tokens"),
        ({"size": (0, 4)}, ValueError, "size.0.: expected an integer"),
        ({"scale": "1"}, TypeError, "scale: expected a number"),
        ({"window": 3}, ValueError, "window: expected positions"),
        ({"sink": torch.zeros(6)}, ValueError, "query, key, sink: expected one entry a layer"),
        ({"lam": -1.0}, ValueError, "lam: expected a number of at least 0"),
        ({"layer_weights": [1.0]}, ValueError, "layer_weights: expected 3 weights, got 1"),
        ({"normalize": "mean"}, ValueError, "normalize: expected one of"),
        ({"regions": 0.4}, TypeError, "regions: expected a dict of the options"),
        ({"regions": {"top": 2}}, ValueError, "regions: expected the option 'keep'"),
        ({"regions": {"keep": 0.4, "peak": 2}}, ValueError, "regions: expected one of 'keep', 'top'"),
        ({"regions": {"keep": 0.4}}, ValueError, "top, floor: expected exactly one of them"),
        (
            {"grid": [(2, 4), (2, 2)], "size": [(4, 4), (4, 4)], "regions": WANTED},
            ValueError,
            "regions: expected None beside several views",
        ),
        ({"out": torch.zeros(3)}, TypeError, "out: expected a Saliency of an earlier call"),
        ({"key": nan_key}, ValueError, "key: captured maps: expected finite values of at least 0, got NaN"),
        ({"backend": "gpu"}, ValueError, "backend: expected one of"),
        ({"backend": "cuda"}, BackendUnavailable, "cuda"),
        ({"backend": "triton", "regions": WANTED}, BackendUnavailable, "triton cannot serve"),
    ],
)
def test_bad_arguments_are_named(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments, options = replaced(**changes)
    with pytest.raises(error, match=message):
        saliency(*arguments, **options)


def test_the_memory_of_another_call_is_refused() -> None:
    arguments, options = problem()
    plain, with_regions = saliency(*arguments, **options), saliency(*arguments, **options, regions=WANTED)
    with pytest.raises(ValueError, match="out: expected a saliency with regions, as this call, got another"):
        saliency(*arguments, **options, regions=WANTED, out=plain)
    with pytest.raises(ValueError, match=r"out: expected a saliency of 36 x 25 pixels, got .* \[25, 36\]"):
        saliency(*arguments[:5], (36, 25), **options, out=plain)
    with pytest.raises(ValueError, match="out: expected a saliency of as many regions"):
        saliency(*arguments, **options, regions={"keep": 0.3, "top": 3}, out=with_regions)
    with pytest.raises(ValueError, match="out: expected a saliency of 30 x 30 pixels"):
        saliency(*arguments[:5], (30, 30), **options, out=plain)
    with pytest.raises(ValueError, match="out: expected a saliency without regions"):
        saliency(*arguments, **options, out=with_regions)
    with pytest.raises(ValueError, match=r"out.maps: expected shape \[T, M, 1, 1, 12\]"):
        other, _ = problem(CASE.but(tokens=8), layers=LAYERS)
        saliency(*arguments, **options, out=saliency(*other[:4], (2, 4), SIZE, **options))
    with pytest.raises(ValueError, match="regions: expected a saliency that was computed with regions="):
        plain.regions()


def test_general_maps_in_the_memory_that_is_written_are_refused(backend: str) -> None:
    arguments, options = problem()
    first = saliency(*arguments, **options, backend=backend)
    before = first.maps.clone()
    arguments[3] = first.maps
    with pytest.raises(ValueError, match=r"general: expected memory that out= does not write, .*general.clone\(\)"):
        saliency(*arguments, **options, out=first, backend=backend)
    assert torch.equal(first.maps, before)


def test_memory_of_other_layers_is_refused_before_it_is_written(backend: str) -> None:
    arguments, options = problem()
    first = saliency(*arguments, **options, backend=backend)
    before = first.maps.clone()
    for count in (1, LAYERS + 1):
        fewer, shared = problem(layers=count)
        with pytest.raises(ValueError, match=f"out: expected a saliency of {count} layers, got one of {LAYERS}"):
            saliency(*fewer, **shared, out=first, backend=backend)
    assert torch.equal(first.maps, before)


def test_layers_of_several_dtypes_and_lengths_are_captured_one_after_the_other(backend: str) -> None:
    for changes in ({"dtype": torch.bfloat16}, {"keys": 250}):
        arguments, options = problem()
        (query, key, _), _ = planted(CASE.but(**changes))
        arguments[0][1], arguments[1][1] = query, key
        found = saliency(*arguments, **options, backend=backend)
        alone = capture(query, key, arguments[2], **options, backend=backend)
        assert torch.equal(found.maps[1], alone.maps[0, 0])


def test_regions_stay_when_the_next_call_writes_its_memory(backend: str) -> None:
    if backend == "triton":
        pytest.skip("triton finds no regions")
    arguments, options = problem(regions=WANTED)
    first = saliency(*arguments, **options, backend=backend)
    found = first.regions()
    before = [part.clone() for part in (found.mask, found.boxes, found.scores)]
    others, _ = problem(CASE.but(seed=9))
    saliency(*others, **options, out=first, backend=backend)
    assert not torch.equal(first.regions().mask, before[0])
    assert all(map(torch.equal, (found.mask, found.boxes, found.scores), before))


@pytest.mark.gpu
@pytest.mark.parametrize("selected", [None, WANTED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_a_graph_replays_the_stages_to_the_bit(dtype: torch.dtype, selected: Any) -> None:
    device = torch.device("cuda")
    arguments, options = problem(CASE.but(keys=700, tokens=192, size=64, dtype=dtype), regions=selected)
    arguments[4:] = [(12, 16), (336, 448)]
    there = move(arguments, device)
    memory = saliency(*there, **options)
    assert_equal(memory, stages("cuda", there, options))
    torch.cuda.synchronize()
    graph, _ = Graphs(device).capture(lambda: saliency(*there, **options, out=memory))
    for seed in (11, 12):
        newer, _ = problem(CASE.but(keys=700, tokens=192, size=64, dtype=dtype, seed=seed))
        for old, new in zip((*there[0], *there[1]), (*newer[0], *newer[1]), strict=True):
            old.copy_(new)
        graph.replay()
        assert_equal(memory, stages("cuda", there, options))
