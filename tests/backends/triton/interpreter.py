"""Triton's interpreter for tests: corrected where it is silently wrong, with counters of memory traffic.

As shipped, the interpreter computes bfloat16 on bit patterns, trusts every alignment hint, gives numbers the type of
their value instead of their annotation, divides more accurately than a GPU, sums products in an order that depends on
the shape, and runs the programs of a grid in one order. `faithful` fixes all but the last; `programs_in` changes the
order; `traffic` counts loads and stores. All depend on private names of the interpreter: the canary in
`test_interpreter.py` fails when they change.
"""

from __future__ import annotations

import contextlib
import inspect
import random
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy
import triton
import triton.language as tl
from triton.runtime import interpreter, jit

Builder = interpreter.InterpreterBuilder
Handle = interpreter.TensorHandle

_FIXED = ("create_dot", "cast_impl", "binary_op", "unary_op", "create_fma")
SHIPPED: dict[str, Callable[..., Any]] = {name: getattr(Builder, name) for name in _FIXED}
SHIPPED["apply_impl"] = interpreter.ReduceOps.apply_impl
SHIPPED["_init_args_hst"] = interpreter.GridExecutor._init_args_hst
SHIPPED["_patch_lang_tensor"] = interpreter._patch_lang_tensor
SHIPPED["_get_np_dtype"] = interpreter._get_np_dtype
SHIPPED["block_type"], SHIPPED["tensor"] = tl.core.block_type.__init__, tl.core.tensor.__init__
SHIPPED["same"] = tl.core.dtype.__eq__
# What types of blocks and values of a type consist of, by the type's name and shape.
_BLOCKS: dict[Any, dict[str, Any]] = {}
_VALUES: dict[str, dict[str, Any]] = {}
_ARRAYS: dict[str, Any] = {}


def widen(bits: numpy.ndarray) -> numpy.ndarray:
    """The float32 values of bfloat16 bits."""
    return (bits.astype(numpy.uint32) << 16).view(numpy.float32)


def narrow(values: numpy.ndarray) -> numpy.ndarray:
    """The bfloat16 bits of float32 values, to nearest, ties to even."""
    values = numpy.ascontiguousarray(values, numpy.float32)
    bits = values.view(numpy.uint32)
    rounded = ((bits + numpy.uint32(0x7FFF) + ((bits >> 16) & numpy.uint32(1))) >> 16).astype(numpy.uint16)
    return numpy.where(numpy.isnan(values), numpy.uint16(0x7FC0), rounded)


def _is_bfloat16(handle: Any) -> bool:
    return bool(handle.dtype.scalar == tl.bfloat16)


def _wide(handle: Any) -> Any:
    return Handle(widen(handle.data), tl.float32) if _is_bfloat16(handle) else handle


def _narrow_result(values: numpy.ndarray) -> Any:
    # Comparisons of any type give booleans.
    return Handle(values, tl.int1) if values.dtype == numpy.bool_ else Handle(narrow(values), tl.bfloat16)


def _divide(self: Any, left: Any, right: Any) -> Any:
    # `/` of float32 is div.full.f32 on a GPU: it may be off by two units, and x / x may differ from 1.
    exact = self.binary_op(left, right, numpy.divide)
    if exact.dtype.scalar != tl.float32:
        return exact
    return Handle(numpy.where(numpy.isfinite(exact.data), numpy.nextafter(exact.data, 0), exact.data), tl.float32)


def _refuse_bfloat16(value: Any) -> None:
    if value.dtype.scalar == tl.bfloat16:
        raise NotImplementedError("the interpreter computes this on bit patterns: widen bfloat16 to float32 first")


def _dot(self: Any, left: Any, right: Any, total: Any, *_options: Any) -> Any:
    # As shipped, a BLAS sums in an order that depends on the shape; on a GPU an element is the same in every tile.
    # In 64 bits the order has less effect than the rounding of the result.
    columns, rows = _wide(left).data.astype(numpy.float64), _wide(right).data.astype(numpy.float64)
    # Keys that no row sees may hold NaN and inf, and whole tiles are multiplied: the result must not depend on them.
    with numpy.errstate(invalid="ignore"):
        return Handle((numpy.matmul(columns, rows) + total.data).astype(total.data.dtype), total.dtype.scalar)


def _cast(self: Any, source: Any, target: Any) -> Any:
    wide = _wide(source)
    if target.scalar != tl.bfloat16:
        return wide if wide.dtype.scalar == target.scalar else SHIPPED["cast_impl"](self, wide, target)
    return source if _is_bfloat16(source) else Handle(narrow(source.data.astype(numpy.float32)), tl.bfloat16)


def _binary(self: Any, left: Any, right: Any, operation: Any) -> Any:
    if not (_is_bfloat16(left) or _is_bfloat16(right)):
        return SHIPPED["binary_op"](self, left, right, operation)
    return _narrow_result(operation(_wide(left).data, _wide(right).data))


def _unary(self: Any, argument: Any, operation: Any) -> Any:
    if not _is_bfloat16(argument):
        return SHIPPED["unary_op"](self, argument, operation)
    return _narrow_result(operation(_wide(argument).data))


def _fma(self: Any, left: Any, right: Any, total: Any) -> Any:
    _refuse_bfloat16(total)
    return SHIPPED["create_fma"](self, left, right, total)


def _reduce(self: Any, inputs: Any) -> Any:
    for value in inputs:
        _refuse_bfloat16(value)
    return SHIPPED["apply_impl"](self, inputs)


def _set_hint(self: Any, name: str, values: list[int]) -> None:
    # On a GPU a wrong hint reads wrong bytes or faults. The hint of a block is about the first element of each run,
    # which only the compiler knows.
    if name == "tt.divisibility" and self.data.size == 1 and int(self.data.item()) % values[0]:
        raise ValueError(f"the kernel says that {self.data.item()} is a multiple of {values[0]}")
    self.attr[name] = values


_NUMBERS = {
    "i32": (numpy.int32, tl.int32),
    "i64": (numpy.int64, tl.int64),
    "fp32": (numpy.float32, tl.float32),
}


def _typed(value: Any, annotation: str) -> Any:
    """A number as a compiled kernel gets it: a stride that is annotated with 64 bits has 64, even if it is small."""
    if annotation not in _NUMBERS or not isinstance(value, (int, float)):
        return value
    of_numpy, of_triton = _NUMBERS[annotation]
    return tl.tensor(Handle(numpy.array([value], of_numpy), of_triton), of_triton)


def _on_host(self: Any, args: Any, named: Any) -> tuple[list[Any], dict[str, Any]]:
    positional, keywords = SHIPPED["_init_args_hst"](self, args, named)
    types = {name: jit._normalize_ty(kind) for name, kind in inspect.get_annotations(self.fn).items()}
    values = [_typed(value, types.get(name, "")) for name, value in zip(self.arg_names, positional, strict=False)]
    return values, {name: _typed(value, types.get(name, "")) for name, value in keywords.items()}


def _patch_tensor(tensor: Any, scope: Any) -> None:
    # Triton 3.6 converts an array of one element to an index, which NumPy 2.4 refuses.
    SHIPPED["_patch_lang_tensor"](tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


def _call(self: Any, *args: Any, **named: Any) -> Any:
    # As shipped, every call of a device function patches the language, which takes longer than the function.
    if any(tl.core.is_builtin(module.full) for module in (tl, tl.core)):
        interpreter._patch_lang(self.fn)
    try:
        return self.rewrite()(*args, **named)
    except Exception as error:
        raise triton.runtime.errors.InterpreterError(repr(error)) from error


def _block_type(self: Any, element: Any, shape: Any) -> None:
    sizes = shape.values if isinstance(shape, tl.core.tuple) else shape
    key = element.name, *(size.value if isinstance(size, tl.core.constexpr) else size for size in sizes)
    if key not in _BLOCKS:
        SHIPPED["block_type"](self, element, shape)
        _BLOCKS[key] = dict(vars(self))
    vars(self).update(_BLOCKS[key])


def _tensor(self: Any, handle: Any, kind: Any) -> None:
    if kind.name not in _VALUES:
        SHIPPED["tensor"](self, handle, kind)
        _VALUES[kind.name] = {name: value for name, value in vars(self).items() if name != "handle"}
    vars(self).update(_VALUES[kind.name], handle=handle)


def _array_type(kind: Any) -> Any:
    name = kind.scalar.name
    if name not in _ARRAYS:
        _ARRAYS[name] = SHIPPED["_get_np_dtype"](kind)
    return _ARRAYS[name]


@contextlib.contextmanager
def _remembered() -> Iterator[None]:
    """As shipped, every operation composes the types of its operands and result again, a third of a kernel's time."""
    with contextlib.ExitStack() as stack:
        for owner, name, function in (
            (tl.core.block_type, "__init__", _block_type),
            (tl.core.tensor, "__init__", _tensor),
            (tl.core.dtype, "__eq__", lambda self, other: self is other or SHIPPED["same"](self, other)),
            (interpreter, "_get_np_dtype", _array_type),
        ):
            stack.enter_context(mock.patch.object(owner, name, function))
        yield


@contextlib.contextmanager
def faithful() -> Iterator[None]:
    """bfloat16 by value, hints checked against addresses, numbers of their annotated types, a GPU's division."""
    fixes = {
        "create_dot": _dot, "cast_impl": _cast, "binary_op": _binary, "unary_op": _unary, "create_fma": _fma,
        "create_fdiv": _divide,
    }  # fmt: skip
    with _remembered(), contextlib.ExitStack() as stack:
        for name, method in fixes.items():
            stack.enter_context(mock.patch.object(Builder, name, method))
        stack.enter_context(mock.patch.object(interpreter.ReduceOps, "apply_impl", _reduce))
        stack.enter_context(mock.patch.object(Handle, "set_attr", _set_hint))
        stack.enter_context(mock.patch.object(interpreter.GridExecutor, "_init_args_hst", _on_host))
        stack.enter_context(mock.patch.object(interpreter, "_patch_lang_tensor", _patch_tensor))
        stack.enter_context(mock.patch.object(interpreter.InterpretedFunction, "__call__", _call))
        # As shipped, each sum and product is repeated in 64 bits, and the result is discarded.
        options = interpreter.InterpreterOptions(sanitize_overflow=False)
        stack.enter_context(mock.patch.object(interpreter.interpreter_builder, "options", options))
        yield


@contextlib.contextmanager
def overflows_are_errors() -> Iterator[None]:
    """Integer sums and products that overflow raise, such as an offset of 32 bits that needs 64."""
    options = interpreter.InterpreterOptions(debug=True)
    with mock.patch.object(interpreter.interpreter_builder, "options", options):
        yield


@contextlib.contextmanager
def as_shipped() -> Iterator[None]:
    """The interpreter's bfloat16, inside `faithful`."""
    with contextlib.ExitStack() as stack:
        for name in _FIXED:
            stack.enter_context(mock.patch.object(Builder, name, SHIPPED[name]))
        yield


@contextlib.contextmanager
def programs_in(order: str, seed: int = 0) -> Iterator[None]:
    """Run the programs of each grid in "forward", "reverse" or "shuffled" order."""
    shipped = Builder.set_grid_idx

    def set_grid_idx(self: Any, x: int, y: int, z: int) -> None:
        _, height, depth = self.grid_dim
        count = self.grid_dim[0] * height * depth
        turn = (x * height + y) * depth + z
        if order == "reverse":
            turn = count - 1 - turn
        elif order == "shuffled":
            turn = random.Random(f"{seed} {count}").sample(range(count), count)[turn]
        shipped(self, turn // (height * depth), turn // depth % height, turn % depth)

    with mock.patch.object(Builder, "set_grid_idx", set_grid_idx):
        yield


class Traffic:
    """The bytes that kernels moved in a `traffic` context, and their names in the order of their launches.

    An element that a program loads again comes from the cache, so it counts once; each store counts.
    """

    def __init__(self) -> None:
        self.read_bytes = 0
        self.written_bytes = 0
        self.launches: list[str] = []
        self._of_program: dict[int, list[numpy.ndarray]] = {}

    def load(self, addresses: numpy.ndarray, size: int) -> None:
        self._of_program.setdefault(size, []).append(addresses)

    def end_program(self) -> None:
        for size, addresses in self._of_program.items():
            self.read_bytes += size * numpy.unique(numpy.concatenate(addresses)).size
        self._of_program.clear()


@contextlib.contextmanager
def traffic() -> Iterator[Traffic]:
    """Count the elements that `tl.load` and `tl.store` access under their masks."""
    counted = Traffic()
    load, store, begin = Builder.create_masked_load, Builder.create_masked_store, Builder.set_grid_idx
    run = interpreter.InterpretedFunction.run

    def accessed(pointers: Any, mask: Any) -> tuple[numpy.ndarray, int]:
        addresses = pointers.data[numpy.broadcast_to(mask.data, pointers.data.shape)]
        return addresses.ravel(), max(1, pointers.get_element_ty().primitive_bitwidth // 8)

    def counting_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        counted.load(*accessed(pointers, mask))
        return load(self, pointers, mask, *rest)

    def counting_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        addresses, size = accessed(pointers, mask)
        counted.written_bytes += size * addresses.size
        return store(self, pointers, value, mask, *rest)

    def counting_begin(self: Any, *index: int) -> None:
        counted.end_program()
        begin(self, *index)

    def counting_run(self: Any, *args: Any, **options: Any) -> Any:
        counted.launches.append(self.__name__)
        result = run(self, *args, **options)
        counted.end_program()
        return result

    with (
        mock.patch.object(Builder, "create_masked_load", counting_load),
        mock.patch.object(Builder, "create_masked_store", counting_store),
        mock.patch.object(Builder, "set_grid_idx", counting_begin),
        mock.patch.object(interpreter.InterpretedFunction, "run", counting_run),
    ):
        yield counted
