"""Capture by the compiled backend: threads, instructions, errors, and the cost and memory of a call."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from carve_kernels import BackendUnavailable, capture, capture_layers
from carve_kernels.backends import cpu
from carve_kernels.backends.cpu import capture as cpu_capture
from carve_kernels.types import Capture, CaptureOptions, Layers, Slot
from tests.support.attention import Case, planted, poisoned
from tests.support.capture_backends import forced_isa
from tests.support.planted_maps import serving


@pytest.fixture(autouse=True)
def _served() -> None:
    arguments, options = planted(Case())
    serving("capture", "cpu", *arguments, CaptureOptions(**options))


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def available() -> list[str]:
    return list(cpu.ISAS[: cpu.ISAS.index(cpu.isa()[1]) + 1])


LONG = Case(batch=1, rows=2, keys=2700, tokens=1500, query_heads=6, key_heads=1, size=80, gain=1.0)


@pytest.mark.parametrize("heads", ["mean", "each"])
@pytest.mark.parametrize(
    "case",
    [LONG, LONG.but(key_heads=3, view="positions", window=900), LONG.but(rows=70, keys=600, batch=3, key_heads=2)],
)
def test_the_result_is_the_same_for_any_number_of_threads(
    threads: Callable[[int], None], case: Case, heads: str
) -> None:
    arguments, options = planted(case.but(dtype=torch.bfloat16))
    results = []
    for count in (1, 2, 3, 5, 8):
        threads(count)
        out = poisoned(case, heads)
        results.append(capture(*arguments, **options, heads=heads, out=out, backend="cpu"))  # type: ignore[arg-type]
    for other in results[1:]:
        for part, first in zip(other, results[0], strict=True):
            assert torch.equal(part, first)


def test_many_layers_go_in_waves() -> None:
    """More sums than fit in one wave: 8 layers of 2 KV heads, 32 rows and 5000 tokens."""
    case = Case(batch=1, rows=32, keys=5100, tokens=5000, query_heads=2, size=32, view="all")
    layers = [planted(case.but(seed=seed))[0] for seed in range(8)]
    out = Capture(torch.full((1, 8, 1, 32, 5000), torch.nan), *(torch.full((1, 8, 1, 32), torch.nan) for _ in "me"))
    tokens = layers[0][2]
    capture_layers(
        [layer[0] for layer in layers], [layer[1] for layer in layers], tokens, scale=0.2, step=torch.tensor(0),
        out=out, backend="cpu",
    )  # fmt: skip
    for layer_index, (query, key, _) in enumerate(layers):
        for buffer, part in zip(out, capture(query, key, tokens, scale=0.2, backend="cpu"), strict=True):
            assert torch.equal(buffer[0, layer_index], part)


@pytest.mark.parametrize("isa", cpu.ISAS)
def test_any_strides(isa: str) -> None:
    if isa not in available():
        pytest.skip(f"this machine has no {isa}")
    (query, key, tokens), options = planted(Case(rows=5, view="head mask", dtype=torch.bfloat16))
    with forced_isa(isa):
        plain = capture(query, key, tokens, **options, backend="cpu")
        options["mask"] = options["mask"].permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
        spread = torch.full((*query.shape, 2), float("nan"), dtype=query.dtype)
        spread[..., 1] = query
        cache = key.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)
        rows = torch.zeros(5, 2, 24)
        for maps in (rows.transpose(0, 1)[..., :19], torch.zeros(2, 19, 5).transpose(1, 2)):
            out = Capture(maps, torch.zeros(5, 2).T, torch.zeros(2, 9)[:, ::2])
            found = capture(spread[..., 1], cache, tokens.T.contiguous().T, **options, out=out, backend="cpu")
            assert found.maps is maps
            for part, wanted in zip(found, plain, strict=True):
                assert torch.equal(part, wanted)
    assert not rows[..., 19:].any()


@pytest.mark.parametrize("isa", cpu.ISAS)
def test_exponentials_are_accurate_to_the_last_units(isa: str) -> None:
    """One token for each key and logits from 0 down to -86: each probability is exp(logit) over a known sum."""
    if isa not in available():
        pytest.skip(f"this machine has no {isa}")
    logits = -torch.linspace(0, 86, 4096, dtype=torch.float64).float()
    key = torch.zeros(1, 1, 4096, 32)
    key[0, 0, :, 0] = logits
    query = torch.zeros(1, 1, 1, 32)
    query[..., 0] = 1
    with forced_isa(isa):
        found = capture(query, key, torch.arange(4096)[None], scale=1.0, backend="cpu").maps[0, 0].double()
    truth = logits.double().softmax(-1)
    # Units of float32: 3 for the power, the sum and the factor, and those of a logit in base 2, up to 1.5 times it.
    error = ((found - truth) / truth).abs() / torch.finfo(torch.float32).eps
    normal = truth > 1e-36
    assert bool((error < 3 - 1.5 * logits.double())[normal].all())
    assert error[logits > -1].max() < 3


def test_refused_arguments_have_a_reason() -> None:
    (query, key, tokens), options = planted(Case())
    for changed, reason in (
        ((query.double(), key.double(), tokens), "float64"),
        ((query[:, :0], key, tokens), "query has no heads; use backend='reference'"),
        ((query, key.transpose(2, 3).contiguous().transpose(2, 3), tokens), "key has stride 77"),
    ):
        with pytest.raises(BackendUnavailable, match=reason):
            capture(*changed, **options, backend="cpu")
        assert capture(*changed, **options).maps.shape == (2, 3, 19)


def test_layers_of_different_shapes_go_one_by_one() -> None:
    case = Case(batch=1, rows=1, view="all", ragged=False)
    layers = [planted(case.but(size=size))[0] for size in (64, 96)]
    out = Capture(torch.full((1, 2, 1, 1, 19), torch.nan), *(torch.full((1, 2, 1, 1), torch.nan) for _ in "me"))
    tokens = layers[0][2]
    capture_layers(
        [layer[0] for layer in layers], [layer[1] for layer in layers], tokens, scale=0.1, step=torch.tensor(0),
        out=out, backend="cpu",
    )  # fmt: skip
    for layer_index, (query, key, _) in enumerate(layers):
        assert torch.equal(out.maps[0, layer_index], capture(query, key, tokens, scale=0.1, backend="cpu").maps)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sse9", "CARVE_KERNELS_CPU: expected one of 'plain', 'avx2', 'avx512', 'avx512_bf16', 'amx', got 'sse9'"),
        ("plain", "plain"),
    ],
)
def test_the_environment_names_the_instructions(name: str, message: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", "from carve_kernels.backends import cpu; cpu.unavailable(); print(cpu.isa()[0])"],
        env={**os.environ, "CARVE_KERNELS_CPU": name},
        capture_output=True,
        text=True,
    )
    assert message in result.stdout + result.stderr
    assert (result.returncode == 0) == (name == "plain")


def seconds(run: Callable[[], Any], calls: int = 300) -> float:
    """The least of several mean times of this thread, which other processes do not lengthen."""
    means = []
    for _ in range(8):
        start = time.thread_time()
        for _ in range(calls):
            run()
        means.append((time.thread_time() - start) / calls)
    return min(means)


def test_a_call_costs_little() -> None:
    query, key, tokens = torch.randn(1, 2, 1, 32), torch.randn(1, 1, 4, 32), torch.arange(3)[None]
    out = (torch.zeros(1, 1, 3), torch.zeros(1, 1), torch.zeros(1, 1))
    op = torch.ops.carve_kernels.capture_layers.default
    memory = torch.empty(0, dtype=torch.uint8), torch.empty(0, dtype=torch.int32)
    rest = (tokens, None, None, None, [], None, 0.1, 0.0, 0, False, None, 0, *memory, *out)
    compiled = seconds(lambda: op([query], [key], *rest))
    public = seconds(lambda: capture(query, key, tokens, scale=0.1, backend="cpu"))
    # 6 and 28 microseconds on an idle machine; another process on the same core doubles both.
    assert public < 15 * compiled


def test_a_decode_loop_allocates_nothing() -> None:
    """Every call after the first reuses the scratch of the call before."""
    (query, key, tokens), options = planted(Case(batch=1, rows=1, keys=4000, tokens=3000, view="all"))
    out = Capture(torch.zeros(4, 2, 1, 1, 3000), torch.zeros(4, 2, 1, 1), torch.zeros(4, 2, 1, 1))
    step = torch.zeros((), dtype=torch.int64)

    def run() -> None:
        shared = CaptureOptions(**options)
        cpu_capture.forward_layers(Layers([query] * 2, [key] * 2), tokens, shared, Slot(out, step))

    run()
    with torch.profiler.profile(profile_memory=True) as profile:
        run()
    assert sum(event.self_cpu_memory_usage for event in profile.key_averages()) == 0
