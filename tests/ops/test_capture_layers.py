"""Capture of several layers in one call: the same as each layer alone, and errors name the argument."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from carve_kernels import capture, capture_layers
from carve_kernels.backends import cpu
from carve_kernels.types import Capture
from tests.support.attention import Case, planted
from tests.support.capture_backends import BACKENDS, entered
from tests.support.operators import capture_cpu, operator

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


def test_the_operator_refuses_layers_of_several_dtypes() -> None:
    if reason := cpu.unavailable():
        pytest.skip(reason)
    query, key, *rest = capture_cpu()
    mixed = [[*layers[:-1], layers[-1].half()] for layers in (query, key)]
    with pytest.raises(RuntimeError, match="query: expected the same dtype in all layers"):
        operator("carve_kernels::capture_cpu")(*mixed, *rest)


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
