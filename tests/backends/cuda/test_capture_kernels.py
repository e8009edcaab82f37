"""The CUDA kernels of capture in the emulator: thread orders, strides, guard bands, launches and bytes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from carve_kernels import capture, capture_layers
from carve_kernels.backends.reference import capture as reference
from carve_kernels.selfcheck.cuda_work import capture_work
from carve_kernels.types import Capture, CaptureOptions
from tests.emulator import emulator
from tests.support.attention import Case, exact, planted, poisoned
from tests.support.cuda_capture import LONG, WIDE, alike, captured, layered, same
from tests.support.tolerances import close, relative, roundings


@pytest.fixture(autouse=True)
def _served() -> Iterator[None]:
    with emulator.serving("capture"):
        yield


# As in csrc/cuda/capture/capture.cuh.
LAYERS_AT_ONCE = 32


def run_layers(problems: list[Any], out: Capture, step: int = 0, **options: Any) -> None:
    capture_layers(
        [query for query, _, _ in problems], [key for _, key, _ in problems], problems[0][2],
        step=torch.tensor(step), out=out, backend="cuda", **options,
    )  # fmt: skip


@pytest.mark.parametrize("heads", ["mean", "each"])
@pytest.mark.parametrize("case", [LONG.but(keys=300), WIDE.but(dtype=torch.bfloat16)])
def test_any_order_of_threads_and_blocks_gives_the_same_bits(case: Case, heads: str) -> None:
    first = captured(case, heads)
    for order, resident, seed in (("reverse", 1, 1), ("shuffled", 1, 2), ("shuffled", 5, 3), ("reverse", 3, 1)):
        with emulator.running("capture", order, resident=resident, seed=seed):
            assert same(captured(case, heads), first), (order, resident)


@pytest.mark.parametrize("heads", ["mean", "each"])
def test_a_batch_of_two_equals_each_row(heads: str) -> None:
    (query, key, tokens), options = planted(LONG)
    both = captured(LONG, heads)
    for b in range(2):
        part = slice(b, b + 1)
        alone = {**options, "positions": options["positions"][part]}
        found = capture(query[part], key[part], tokens[part], **alone, heads=heads, backend="cuda")  # type: ignore[arg-type]
        assert alike(found, Capture(*(part_of[b : b + 1] for part_of in both)))


def test_a_batch_of_layers_equals_each_layer_and_takes_three_launches() -> None:
    case = WIDE.but(sink=False, rows=2)
    problems, out = layered(case, 3, steps=2)
    options = planted(case)[1]
    emulator.counters("capture")
    run_layers(problems, out, step=1, **options)
    # The first finds the lowest and the highest token.
    assert emulator.counters("capture").launches == 3
    for place, (query, key, _) in enumerate(problems):
        alone = capture(query, key, problems[0][2], **options, backend="cuda")
        assert alike(Capture(*(part[1, place] for part in out)), alone)
    assert all(bool(part[0].isnan().all()) for part in out)


def test_more_layers_than_fit_into_the_arguments_take_more_launches() -> None:
    case = Case(batch=1, rows=1, keys=9, tokens=4, query_heads=2, size=32, view="all", ragged=False)
    problems, out = layered(case, LAYERS_AT_ONCE + 2)
    emulator.counters("capture")
    run_layers(problems, out, scale=0.2)
    assert emulator.counters("capture").launches == 5
    for place, (query, key, _) in enumerate(problems):
        assert alike(
            Capture(*(part[0, place] for part in out)), capture(query, key, problems[0][2], scale=0.2, backend="cuda")
        )


@pytest.mark.parametrize(("dtype", "launched"), [(torch.float32, [3, 3]), (torch.bfloat16, [3, 1])])
def test_one_launch_with_a_given_sum_and_none_without_work(dtype: torch.dtype, launched: list[int]) -> None:
    case = Case(view="all", batch=1, dtype=dtype)
    (query, key, tokens), options = planted(case)
    logits = query @ key.repeat_interleave(3, 1).mT * options["scale"]
    launches = []
    for arguments, more in (
        ((query, key, tokens), {}),
        ((query, key, tokens), {"lse": logits.float().logsumexp(-1)}),
        ((query, key, tokens[:, :0]), {}),
        ((query, key[:, :, :0], tokens), {}),
        ((query[:0], key[:0], tokens[:0]), {}),
        ((query[:, :, :0], key, tokens), {}),
    ):
        emulator.counters("capture")
        capture(*arguments, **options, **more, backend="cuda")
        launches.append(emulator.counters("capture").launches)
    assert launches == [*launched, 1, 1, 0, 0]


def test_any_strides_and_keys_without_alignment() -> None:
    case = Case(rows=5, view="head mask", dtype=torch.bfloat16, size=72, keys=91)
    (query, key, tokens), options = planted(case)
    plain = captured(case)
    options["mask"] = options["mask"].permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    spread = torch.full((*query.shape, 2), float("nan"), dtype=query.dtype)
    spread[..., 1] = query
    cache = torch.full((91, 2, 2, 75), float("nan"), dtype=key.dtype)
    moved = cache.permute(1, 2, 0, 3)[..., 1:73].copy_(key)
    assert moved.data_ptr() % 16 and moved.stride(2) % 8
    rows = torch.full((24, 5, 2), 7.0)
    out = Capture(rows[:19].permute(2, 1, 0), torch.zeros(5, 2).T, torch.zeros(2, 9)[:, ::2])
    # The odd columns of a wider matrix of indices.
    positions = torch.stack([torch.full_like(tokens.T, -5), tokens.T], -1).long()
    found = capture(spread[..., 1], moved, positions[..., 1].T, **options, out=out, backend="cuda")
    assert found.maps is out.maps and alike(found, plain)
    assert bool((rows[19:] == 7).all())


@pytest.mark.parametrize("size", [33, 50, 100, 130, 250])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_heads_of_other_sizes(size: int, dtype: torch.dtype) -> None:
    case = Case(size=size, dtype=dtype, batch=1, rows=2, view="all", ragged=False)
    arguments, options = planted(case)
    wide = capture(
        *(part.double() if part.is_floating_point() else part for part in arguments), **options, backend="reference"
    )
    assert relative(captured(case).maps, wide.maps) < 1e-5


@settings(max_examples=30, deadline=None)
@given(
    case=st.builds(
        Case,
        batch=st.integers(1, 2),
        query_heads=st.sampled_from([4, 8, 28]),
        key_heads=st.sampled_from([1, 2, 4]),
        rows=st.integers(1, 40),
        keys=st.integers(1, 400),
        size=st.sampled_from([40, 64, 128, 256]),
        tokens=st.integers(1, 150),
        dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
        view=st.sampled_from(["mask", "head mask", "positions", "all"]),
        softcap=st.sampled_from([None, 3.0]),
        window=st.sampled_from([None, 1, 90]),
        sink=st.booleans(),
        gain=st.sampled_from([0.0, 3.0]),
        seed=st.integers(0, 1000),
    ),
    heads=st.sampled_from(["mean", "each"]),
    negative=st.booleans(),
)
def test_any_number_of_rows_with_every_option(case: Case, heads: str, negative: bool) -> None:
    arguments, options = planted(case)
    if negative:
        options["scale"] = -options["scale"]
    wide, wide_options = exact(arguments, options)
    truth = reference.forward(*wide, CaptureOptions(**wide_options, heads=heads))  # type: ignore[arg-type]
    own = reference.forward(*arguments, CaptureOptions(**options, heads=heads))  # type: ignore[arg-type]
    found = capture(*arguments, **options, heads=heads, out=poisoned(case, heads), backend="cuda")  # type: ignore[arg-type]
    for part, mine, right in zip(found, own, truth, strict=True):
        close(part, mine, right, roundings(case.size + 64 + case.query_heads))


def test_more_blocks_of_tokens_than_the_last_one_adds_up_at_a_time() -> None:
    case = Case(
        batch=1, query_heads=1, key_heads=1, rows=1, keys=60, size=64, tokens=9, view="all", ragged=False,
        dtype=torch.bfloat16,
    )  # fmt: skip
    (query, key, _), options = planted(case)
    tokens = torch.randint(0, 60, (1, 22_000), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    lse = (query.float() @ key.float().mT * options["scale"]).logsumexp(-1)
    found = capture(query, key, tokens, **options, lse=lse, backend="cuda")
    truth = reference.forward(query.double(), key.double(), tokens, CaptureOptions(**options, lse=lse.double()))
    assert relative(found.mass, truth.mass) < 1e-4 and relative(found.entropy, truth.entropy) < 1e-4


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_scale_of_zero_gives_every_visible_key_the_same_share(dtype: torch.dtype, softcap: float | None) -> None:
    (query, key, tokens), options = planted(Case(dtype=dtype, batch=1, softcap=softcap))
    options["scale"] = 0.0
    found = capture(query, key, tokens, **options, backend="cuda")
    assert alike(found, reference.forward(query, key, tokens, CaptureOptions(**options)))


def banded(shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """A tensor of NaN between two bands of 64 sevens in the same memory, and that memory."""
    size = torch.Size(shape).numel()
    memory = torch.full((size + 128,), 7.0)
    memory[64 : 64 + size] = float("nan")
    return memory[64 : 64 + size].view(shape), memory


@pytest.mark.parametrize(
    "case", [LONG.but(keys=130), WIDE, WIDE.but(tokens=1, rows=8, size=256), Case(keys=1, tokens=3, view="all")]
)
def test_nothing_outside_the_outputs_is_written(case: Case) -> None:
    arguments, options = planted(case)
    shapes = ((case.batch, case.rows, case.tokens), (case.batch, case.rows), (case.batch, case.rows))
    parts = [banded(shape) for shape in shapes]
    found = capture(*arguments, **options, out=Capture(*(part for part, _ in parts)), backend="cuda")
    assert all(bool(part.isfinite().all()) for part in found)
    for part, memory in parts:
        assert bool((memory[:64] == 7).all()) and bool((memory[64 + part.numel() :] == 7).all())


def test_keys_outside_of_the_window_are_not_read() -> None:
    case = LONG.but(batch=1, rows=1, keys=1000, tokens=5, ragged=False)
    (query, key, tokens), options = planted(case)
    options["positions"] = torch.tensor([[899]])
    read = []
    for window in (None, 100):
        emulator.counters("capture")
        capture(query, key, tokens, **{**options, "window": window}, backend="cuda")
        read.append(emulator.counters("capture").read_bytes)
    assert read[0] - read[1] > 0.9 * 800 * case.key_heads * case.size * 4


@pytest.mark.parametrize("step", [-1, 2, 2**40])
def test_a_step_out_of_range_is_not_written(step: int) -> None:
    problems, out = layered(Case(view="all", batch=1), 2, steps=2)
    run_layers(problems, out, step=step, scale=0.1)
    assert all(bool(part.isnan().all()) for part in out)


GEOMETRIES = {
    "qwen2.5-vl, one row": dict(query_heads=28, key_heads=4, rows=1, keys=1100, size=128, tokens=300),
    "qwen2.5-vl, eight rows": dict(query_heads=14, key_heads=2, rows=8, keys=600, size=128, tokens=150),
    "no groups": dict(query_heads=8, key_heads=8, rows=1, keys=2111, size=64, tokens=99),
    "wide heads": dict(query_heads=8, key_heads=2, rows=2, keys=333, size=256, tokens=40),
    "narrow heads": dict(query_heads=6, key_heads=3, rows=5, keys=500, size=40, tokens=200),
    "many queries": dict(query_heads=8, key_heads=1, rows=40, keys=700, size=128, tokens=300),
}


def span_of(tokens: torch.Tensor) -> int:
    """The keys from the lowest to the highest token."""
    return int(tokens.max() - tokens.min()) + 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_the_kernels_move_the_bytes_of_the_roofline(name: str, dtype: torch.dtype) -> None:
    sizes = GEOMETRIES[name]
    case = Case(batch=1, view="all", ragged=False, dtype=dtype, gain=0.0, **sizes)
    problems, out = layered(case, 2)
    emulator.counters("capture")
    run_layers(problems, out, scale=0.1)
    counted = emulator.counters("capture")
    more = {"seeks_span": True, "span": span_of(problems[0][2])}
    predicted = capture_work(layers=2, batch=1, element_bytes=dtype.itemsize, **more, **sizes)
    assert counted.launches == predicted.launches
    assert counted.read_bytes == pytest.approx(predicted.read_bytes, rel=0.01)
    assert counted.written_bytes == pytest.approx(predicted.written_bytes, rel=0.01)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_a_given_sum_moves_the_bytes_of_the_roofline(name: str, dtype: torch.dtype) -> None:
    sizes = GEOMETRIES[name]
    case = Case(batch=1, view="all", ragged=False, dtype=dtype, gain=0.0, **sizes)
    (query, key, tokens), options = planted(case)
    keys = key.float().repeat_interleave(query.shape[1] // key.shape[1], 1)
    options["lse"] = (query.float() @ keys.mT * options["scale"]).logsumexp(-1)
    emulator.counters("capture")
    capture(query, key, tokens, **options, backend="cuda")
    counted = emulator.counters("capture")
    more = {"seeks_span": True, "span": span_of(tokens), "lse": True}
    predicted = capture_work(layers=1, batch=1, element_bytes=dtype.itemsize, **more, **sizes)
    assert counted.launches == predicted.launches
    assert counted.read_bytes == pytest.approx(predicted.read_bytes, rel=0.01)
    assert counted.written_bytes == pytest.approx(predicted.written_bytes, rel=0.01)
