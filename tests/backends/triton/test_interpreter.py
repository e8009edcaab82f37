"""Faults of the shipped interpreter, their fixes for the tests, and the counters."""

from __future__ import annotations

import numpy
import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from tests.backends.triton import interpreter

if not triton.knobs.runtime.interpret:
    pytest.skip("the kernels run on a GPU here", allow_module_level=True)


@triton.jit
def _dot_kernel(left_ptr, right_ptr, out_ptr, SIZE: tl.constexpr):
    offset = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tl.store(out_ptr + offset, tl.dot(tl.load(left_ptr + offset), tl.load(right_ptr + offset)))


@triton.jit
def _wide_dot_kernel(left_ptr, right_ptr, out_ptr, width, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    row, size, column = tl.arange(0, 16)[:, None], tl.arange(0, SIZE), tl.arange(0, BLOCK)[None, :]
    left = tl.load(left_ptr + row * SIZE + size[None, :])
    right = tl.load(right_ptr + size[:, None] * width + column)
    tl.store(out_ptr + row * BLOCK + column, tl.dot(left, right, input_precision="ieee"))


@triton.jit
def _arithmetic_kernel(left_ptr, right_ptr, sum_ptr, less_ptr, narrow_ptr, SIZE: tl.constexpr):
    offset = tl.arange(0, SIZE)
    left, right = tl.load(left_ptr + offset), tl.load(right_ptr + offset)
    tl.store(sum_ptr + offset, left * right + left)
    tl.store(less_ptr + offset, (left < right).to(tl.int32))
    tl.store(narrow_ptr + offset, (left.to(tl.float32) / 3.0).to(tl.bfloat16))


@triton.jit
def _total_kernel(left_ptr, out_ptr, SIZE: tl.constexpr):
    tl.store(out_ptr, tl.sum(tl.load(left_ptr + tl.arange(0, SIZE)), 0))


@triton.jit
def _share_kernel(left_ptr, plain_ptr, rounded_ptr, SIZE: tl.constexpr):
    offset = tl.arange(0, SIZE)
    left = tl.load(left_ptr + offset)
    tl.store(plain_ptr + offset, left / left)
    tl.store(rounded_ptr + offset, tl.div_rn(left, left))


@triton.jit
def _hint_kernel(left_ptr, stride, UNIT: tl.constexpr):
    left_ptr = tl.multiple_of(left_ptr, 16)
    tl.store(left_ptr + tl.multiple_of(stride, UNIT), 1.0)


@triton.jit
def _sum_kernel(left, right, out_ptr):
    tl.store(out_ptr, left + right)


@triton.jit
def _product_kernel(left: tl.int64, right, out_ptr):
    tl.store(out_ptr, left * right)


@triton.jit
def _order_kernel(turn_ptr, order_ptr):
    offset = (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(2) + tl.program_id(2)
    turn = tl.load(turn_ptr)
    tl.store(order_ptr + turn, offset)
    tl.store(turn_ptr, turn + 1)


@triton.jit
def _double_kernel(left_ptr, out_ptr, count, BLOCK: tl.constexpr):
    offset = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    twice = tl.load(left_ptr + offset, mask=offset < count) + tl.load(left_ptr + offset, mask=offset < count)
    tl.store(out_ptr + offset, twice, mask=offset < count)


def halves(*shape: int) -> torch.Tensor:
    return torch.randn(*shape).to(torch.bfloat16)


def dot_of_ones() -> torch.Tensor:
    ones, out = torch.ones(16, 16, dtype=torch.bfloat16), torch.empty(16, 16)
    _dot_kernel[(1,)](ones, ones, out, SIZE=16)
    return out


def test_canary_the_shipped_interpreter_still_multiplies_the_bits_of_bfloat16() -> None:
    """If this fails, the interpreter has changed: drop the fixes of `faithful` that it no longer needs."""
    with interpreter.as_shipped():
        found = dot_of_ones()
    assert not torch.equal(found, torch.full((16, 16), 16.0))


def test_bfloat16_products_are_right() -> None:
    assert torch.equal(dot_of_ones(), torch.full((16, 16), 16.0))
    left, right, out = halves(16, 16), halves(16, 16), torch.empty(16, 16)
    _dot_kernel[(1,)](left, right, out, SIZE=16)
    torch.testing.assert_close(out, left.float() @ right.float())


def test_a_product_is_the_same_in_every_tile() -> None:
    left, right = torch.randn(16, 64), torch.randn(64, 256)
    whole, part = torch.empty(16, 256), torch.empty(16, 32)
    _wide_dot_kernel[(1,)](left, right, whole, 256, SIZE=64, BLOCK=256)
    _wide_dot_kernel[(1,)](left, right, part, 256, SIZE=64, BLOCK=32)
    assert torch.equal(whole[:, :32], part)


def test_bfloat16_arithmetic_is_torchs() -> None:
    left, right = halves(64), halves(64)
    sums, less, narrowed = torch.empty_like(left), torch.empty(64, dtype=torch.int32), torch.empty_like(left)
    _arithmetic_kernel[(1,)](left, right, sums, less, narrowed, SIZE=64)
    assert torch.equal(sums, left * right + left)
    assert torch.equal(less, (left < right).int())
    assert torch.equal(narrowed, (left.float() / 3.0).to(torch.bfloat16))


def test_a_plain_division_is_no_better_than_on_a_gpu() -> None:
    left = torch.tensor([0.3, 7.0, torch.inf, 0.0])
    plain, rounded = torch.empty(4), torch.empty(4)
    with numpy.errstate(invalid="ignore"):
        _share_kernel[(1,)](left, plain, rounded, SIZE=4)
    assert bool((plain[:2] < 1).all()) and torch.equal(rounded[:2], torch.ones(2))
    assert bool(plain[2:].isnan().all()) and bool(rounded[2:].isnan().all())


def test_what_is_not_fixed_is_refused() -> None:
    with pytest.raises(triton.runtime.errors.InterpreterError, match="widen bfloat16"):
        _total_kernel[(1,)](halves(16), torch.empty(1, dtype=torch.bfloat16), SIZE=16)


@pytest.mark.parametrize("element", [tl.float32, tl.bfloat16, tl.pointer_type(tl.int64)], ids=str)
def test_remembered_types_are_the_shipped_ones(element: tl.dtype) -> None:
    for shape in ([16], [4, 8], [8, 4], [4, 8]):
        found, shipped = tl.block_type(element, shape), object.__new__(tl.block_type)
        interpreter.SHIPPED["block_type"](shipped, element, shape)
        assert found == shipped and str(vars(found)) == str(vars(shipped)) and found.scalar is not None
        value, plain = tl.tensor(None, found), object.__new__(tl.tensor)
        interpreter.SHIPPED["tensor"](plain, None, shipped)
        assert value.type == plain.type and value.dtype == element and value.numel.value == plain.numel.value
        assert [size.value for size in value.shape] == shape


def test_a_false_hint_is_an_error() -> None:
    storage = torch.zeros(64)
    offset = (-storage.data_ptr() % 16) // 4
    aligned = storage[offset:]
    _hint_kernel[(1,)](aligned, 24, UNIT=8)
    assert aligned[24] == 1
    for pointer, stride in ((aligned[1:], 24), (aligned, 20)):
        with pytest.raises(triton.runtime.errors.InterpreterError, match="is a multiple of"):
            _hint_kernel[(1,)](pointer, stride, UNIT=8)


def test_numbers_have_their_annotated_type() -> None:
    out = torch.zeros(1, dtype=torch.int64)
    with interpreter.overflows_are_errors():
        _product_kernel[(1,)](2**20, 2**20, out)
        assert int(out) == 2**40
        with pytest.raises(triton.runtime.errors.InterpreterError, match="overflow"):
            _sum_kernel[(1,)](2**30, 2**30, out)


def test_an_overflow_of_a_float_is_an_error() -> None:
    with pytest.raises(triton.runtime.errors.InterpreterError, match="RuntimeWarning"):
        _double_kernel[(1,)](torch.full((4,), 3e38), torch.empty(4), 4, BLOCK=4)


@pytest.mark.parametrize("order", ["forward", "reverse", "shuffled"])
def test_programs_run_in_the_requested_order(order: str) -> None:
    turn, offsets = torch.zeros(1, dtype=torch.int32), torch.full((24,), -1, dtype=torch.int32)
    with interpreter.programs_in(order):
        _order_kernel[(2, 3, 4)](turn, offsets)
    assert sorted(offsets.tolist()) == list(range(24))
    assert (offsets.tolist() == list(range(24))) == (order == "forward")
    assert (offsets.tolist() == list(range(24))[::-1]) == (order == "reverse")


def test_traffic_counts_unmasked_elements_once_for_each_program() -> None:
    left, out = torch.randn(100), torch.empty(100)
    with interpreter.traffic() as traffic:
        _double_kernel[(2,)](left, out, 100, BLOCK=64)
        _double_kernel[(1,)](left.half(), out.half(), 7, BLOCK=64)
    assert traffic.read_bytes == traffic.written_bytes == 4 * 100 + 2 * 7
    assert traffic.launches == ["_double_kernel", "_double_kernel"]
    assert torch.equal(left + left, out)
