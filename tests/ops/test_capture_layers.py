"""Capture of several layers in one call: the same as each layer alone, and errors name the argument."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from carve_kernels import BackendUnavailable, capture, capture_layers
from carve_kernels.backends import cpu
from carve_kernels.backends.native.scratch import Memory
from carve_kernels.ops.layer_operator import layer_operator
from carve_kernels.types import Capture
from tests.support.attention import Case, planted
from tests.support.capture_backends import BACKENDS, entered

CASE = Case(sink=True, softcap=4.0, view="positions", window=31, rows=2)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with entered(request.param) as backend:
        yield backend


def test_layers_are_captured_into_their_slots(backend: str) -> None:
    arguments, options = planted(CASE)
    sink = options.pop("sink")
    others = [planted(CASE.but(seed=seed))[0] for seed in (5, 6)]
    layers = [arguments, *((query, key, arguments[2]) for query, key, _ in others)]
    batch, rows, tokens = 2, 2, arguments[2].shape[1]
    out = Capture(
        torch.full((4, 5, batch, rows, tokens), torch.nan), *(torch.full((4, 5, batch, rows), torch.nan) for _ in "me")
    )
    capture_layers(
        [layer[0] for layer in layers], [layer[1] for layer in layers], arguments[2],
        step=torch.tensor(2), first=1, out=out, sink=[sink] * 3, backend=backend, **options,
    )  # fmt: skip
    for layer_index, (query, key, columns) in enumerate(layers, start=1):
        alone = capture(query, key, columns, sink=sink, backend=backend, **options)
        for buffer, part in zip(out, alone, strict=True):
            assert torch.equal(buffer[2, layer_index], part)
    written = torch.zeros(4, 5, dtype=torch.bool)
    written[2, 1:4] = True
    assert torch.equal(~out.mass.isnan().flatten(2).any(-1), written)


@pytest.mark.parametrize("order", [1, -1])
def test_layers_of_several_dtypes_keep_their_own(backend: str, order: int) -> None:
    dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.float32][::order]
    problems = [planted(CASE.but(seed=seed, dtype=dtype)) for seed, dtype in enumerate(dtypes)]
    options = problems[0][1]
    sink, tokens = options.pop("sink"), problems[0][0][2]
    shape = (1, len(dtypes), 2, 2)
    out = Capture(*(torch.full(size, torch.nan) for size in ((*shape, tokens.shape[1]), shape, shape)))
    layers = [(query, key) for (query, key, _), _ in problems]
    capture_layers(
        [query for query, _ in layers], [key for _, key in layers], tokens, step=torch.tensor(0), out=out,
        sink=[sink] * len(layers), backend=backend, **options,
    )  # fmt: skip
    for layer_index, (query, key) in enumerate(layers):
        alone = capture(query, key, tokens, sink=sink, backend=backend, **options)
        assert float(alone.mass.amin()) > 0
        for buffer, part in zip(out, alone, strict=True):
            assert torch.equal(buffer[0, layer_index], part)


@pytest.mark.parametrize("backend", ["cpu", "triton", "reference"])
def test_an_operator_that_was_chosen_once_captures_as_capture_does(backend: str) -> None:
    with entered({"cpu": "cpu plain"}.get(backend, backend)) as served:
        (query, key, tokens), options = planted(CASE.but(sink=False))
        operator = layer_operator(served, query.device, dtype=query.dtype, size=query.shape[3])
        assert operator.backend == served
        sizes = {"layers": 2, "batch": 2, "query_heads": query.shape[1], "key_heads": key.shape[1], "rows": 2}
        sizes |= {"keys": key.shape[2], "size": key.shape[3], "tokens": tokens.shape[1], "element_bytes": 4}
        memory = Memory.new(operator.needs(**sizes), query.device)
        out = Capture(torch.zeros(3, 2, 2, 2, tokens.shape[1]), torch.zeros(3, 2, 2, 2), torch.zeros(3, 2, 2, 2))
        for step in range(3):
            operator.run(
                [query, query + step], [key, key], tokens, None, None, options["positions"], [], None,
                options["scale"], options["softcap"], options["window"], False, torch.tensor(step), 0, *memory, *out,
            )  # fmt: skip
            alone = capture(query + step, key, tokens, **options, backend=served)
            assert all(torch.equal(buffer[step, 1], part) for buffer, part in zip(out, alone, strict=True))
            assert not memory.tickets.any()


def test_auto_chooses_an_operator_that_serves() -> None:
    if reason := cpu.unavailable():
        pytest.skip(reason)
    device = torch.device("cpu")
    chosen = {
        backend: layer_operator("auto", device, **{"dtype": torch.float32, "size": 64, **changes}).backend
        for backend, changes in {"cpu": {}, "reference": {"dtype": torch.float64}}.items()
    }
    assert chosen == {"cpu": "cpu", "reference": "reference"}
    assert layer_operator("auto", device, dtype=torch.float32, size=64, dense=False).backend == "reference"
    assert (
        layer_operator("auto", device, dtype=torch.float32, size=64).run
        is torch.ops.carve_kernels.capture_layers.default
    )
    with pytest.raises(BackendUnavailable, match="float64"):
        layer_operator("cpu", device, dtype=torch.float64, size=64)


def test_bad_layers_are_named() -> None:
    (query, key, tokens), options = planted(Case())
    out = Capture(torch.zeros(1, 2, 2, 3, 19), torch.zeros(1, 2, 2, 3), torch.zeros(1, 2, 2, 3))
    step = torch.tensor(0)
    with pytest.raises(ValueError, match="one entry a layer"):
        capture_layers([query], [key, key], tokens, step=step, out=out, **options)
    with pytest.raises(ValueError, match="first: expected"):
        capture_layers([query], [key], tokens, step=step, out=out, first=2, **options)
    with pytest.raises(ValueError, match=r"out\.mass: expected shape"):
        capture_layers([query], [key], tokens, step=step, out=out._replace(mass=torch.zeros(2, 2, 2, 3)), **options)
    with pytest.raises(TypeError, match="step: expected dtype"):
        capture_layers([query], [key], tokens, step=torch.tensor(0.0), out=out, **options)
    with pytest.raises(ValueError, match="step: expected a tensor on cpu as the query, got one on meta"):
        capture_layers([query], [key], tokens, step=step.to("meta"), out=out, **options)
    for field, part in out._asdict().items():
        elsewhere = out._replace(**{field: part.to("meta")})
        with pytest.raises(ValueError, match=rf"out\.{field}: expected a tensor on cpu as the query, got one on meta"):
            capture_layers([query], [key], tokens, step=step, out=elsewhere, **options)
