"""Every operator under `carve_kernels::`: its schema, its fake and its implementation agree, eager and compiled."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from carve_kernels.backends.native import extension
from tests.emulator.emulator import NAMESPACE as EMULATED
from tests.support.operators import (
    KEPT,
    SAMPLES,
    capture_backward,
    capture_layers,
    column_sums_cpu,
    contrast_cpu,
    operator,
    regions_cpu,
    saliency,
)


def registered() -> list[str]:
    return sorted(name for name in torch._C._dispatch_get_all_op_names() if name.startswith("carve_kernels::"))


def outputs(op: Any, arguments: tuple[Any, ...]) -> list[torch.Tensor]:
    """The arguments that the schema marks as written, except for those that the operator keeps."""
    kept = KEPT.get(op._schema.name, frozenset())
    written = [
        argument.alias_info is not None and argument.alias_info.is_write and argument.name not in kept
        for argument in op._schema.arguments
    ]
    return [value for value, is_written in zip(arguments, written, strict=True) if is_written]


def test_every_operator_has_a_sample() -> None:
    # An operator for tensors on a GPU has its sample in the emulator.
    sampled = {name.replace(f"{EMULATED}::", "carve_kernels::") for name in SAMPLES}
    assert registered() == sorted(sampled)


@pytest.mark.parametrize("name", SAMPLES)
def test_operator_writes_its_outputs_and_returns_nothing(name: str) -> None:
    op, arguments = operator(name), SAMPLES[name]()
    before = [out.clone() for out in outputs(op, arguments)]
    assert op(*arguments) is None
    assert outputs(op, arguments)
    for old, new in zip(before, outputs(op, arguments), strict=True):
        assert not torch.equal(old, new)
        assert new.isfinite().all()


@pytest.mark.parametrize("name", SAMPLES)
def test_opcheck(name: str) -> None:
    torch.library.opcheck(operator(name), SAMPLES[name]())


# aot_eager is inductor without its C++, which takes seconds to compile: by default one operator has both.
@pytest.mark.parametrize(
    ("name", "backend"),
    [(name, "aot_eager") for name in SAMPLES]
    + [pytest.param(name, "inductor", marks=pytest.mark.slow if index else ()) for index, name in enumerate(SAMPLES)],
)
def test_compiled_equals_eager(name: str, backend: str) -> None:
    torch._dynamo.reset()
    op, arguments = operator(name), SAMPLES[name]()
    eager = tuple(value.clone() if isinstance(value, torch.Tensor) else value for value in arguments)
    op(*eager)

    def step(arguments: tuple[Any, ...], written: list[torch.Tensor]) -> list[torch.Tensor]:
        op(*arguments)
        return [out * 2 for out in written]

    written = outputs(op, arguments)
    doubled = torch.compile(step, fullgraph=True, backend=backend)(arguments, written)
    for out, twice, wanted in zip(written, doubled, outputs(op, eager), strict=True):
        torch.testing.assert_close(out, wanted, rtol=0, atol=0)
        torch.testing.assert_close(twice, wanted * 2, rtol=0, atol=0)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the resident memory from /proc")
@pytest.mark.parametrize(
    "name", [name for name in SAMPLES if name.startswith("carve_kernels::") and not name.endswith("_in")]
)
def test_compiled_operator_leaks_no_memory(name: str) -> None:
    op, arguments = operator(name), SAMPLES[name]()

    def resident_after(calls: int) -> int:
        for _ in range(calls):
            op(*arguments)
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    start = resident_after(5_000)
    assert resident_after(20_000) - start < 20_000 * 8


def test_contrast_cpu_refuses_what_it_cannot_read() -> None:
    op = operator("carve_kernels::contrast_cpu")
    good = contrast_cpu()
    wrong: list[tuple[int, Any, str]] = [
        (0, good[0].double(), "task: expected float32"),
        (0, torch.rand(19, 3, 2).permute(2, 1, 0), "task: expected a contiguous"),
        (0, torch.rand(3, 19), "with 3 dimensions"),
        (0, torch.rand(3, 3, 19), "layers"),
        (1, torch.rand(2, 2, 19), "steps"),
        (1, torch.rand(2, 1, 18), "tokens"),
        (2, torch.rand(3, dtype=torch.float64), "layer_weights"),
        (3, torch.rand(2, dtype=torch.float64), "step_weights"),
        (4, [3, 5, 11], "four numbers"),
        (4, [3, 5, 11, 7], "no view"),
        (4, [2**62, 2**62, 11, 7, 2, 2, 1, 3], "fit"),
        (4, [3, 5, -11, -7, 2, 2, 1, 3], "fit"),
        (7, 4, "normalize"),
        (8, torch.empty(79), "pixels"),
    ]
    for index, value, message in wrong:
        with pytest.raises(RuntimeError, match=message):
            op(*good[:index], value, *good[index + 1 :])


def test_column_sums_cpu_refuses_what_it_cannot_read() -> None:
    op, good = operator("carve_kernels::column_sums_cpu"), column_sums_cpu()
    query, key, mask, positions, sink, lse = good[:6]
    wrong: list[tuple[int, Any, str]] = [
        (0, query[0], "query: expected 4 dimensions"),
        (0, query.double(), "query: expected float32, float16 or bfloat16"),
        (0, query[..., :8], "key: expected the batch and head size of query"),
        (1, key.half(), "key: expected the dtype of query"),
        (1, key[:1], "key: expected the batch and head size of query"),
        (1, key.repeat(1, 2, 1, 1)[:, :3], "key: .*heads that divides the 4 of query"),
        (1, key.transpose(2, 3).contiguous().transpose(2, 3), "key: expected stride 1"),
        (2, mask.float(), "mask: expected bool"),
        (2, mask[..., :8], "mask: expected the batch"),
        (3, positions[:1], "positions: expected shape"),
        (3, positions.float(), "positions: expected int32 or int64"),
        (3, None, "window: expected positions along with a window"),
        (4, sink[:3], "sink: expected a contiguous float32"),
        (5, lse.transpose(1, 2).contiguous().transpose(1, 2), "lse: expected a contiguous float32"),
        (8, -1, "window: expected at least 0"),
        (9, good[9].double(), "out: expected a contiguous float32"),
        (9, good[9][..., :8], "out: expected a contiguous float32"),
    ]
    for index, value, message in wrong:
        with pytest.raises(RuntimeError, match=message):
            op(*good[:index], value, *good[index + 1 :])


@pytest.mark.parametrize("name", ["carve_kernels::capture_layers", "carve_emulated::capture_layers"])
def test_capture_layers_refuses_what_it_cannot_read(name: str) -> None:
    op = operator(name)
    good = dict(zip([argument.name for argument in op._schema.arguments], capture_layers(), strict=True))
    query, key, tokens, mask = (good[name] for name in ("query", "key", "tokens", "mask"))
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"query": []}, "query, key, sink: expected one entry a layer"),
        ({"query": query[:1]}, "query, key, sink: expected one entry a layer"),
        ({"sink": good["sink"][:1]}, "query, key, sink: expected one entry a layer"),
        ({"step": None}, ".*one layer without a step"),
        ({"query": [part[0] for part in query]}, "query: expected 4 dimensions, got a torch.float32 tensor of shape"),
        ({"query": [part.double() for part in query]}, "query: expected float32, .*got a torch.float64 tensor"),
        ({"query": [query[0], query[1].half()]}, "query: expected the same dtype in all layers"),
        ({"query": [query[0], query[1][:, :2]]}, "query: expected the same shapes in all layers"),
        ({"key": [key[0], key[1][:, :, 1:]]}, "key: .* same shapes in all layers"),
        ({"key": [key[0], key[1][0]]}, "key: .* same shapes in all layers"),
        ({"key": [part.half() for part in key]}, "key: expected the dtype of query, float32, got a torch.float16"),
        ({"key": [part[..., ::2] for part in key], "query": [part[..., ::2] for part in query]}, "key: expected stri"),
        ({"key": [part[:, :1].repeat(1, 3, 1, 1) for part in key]}, "key: .* heads that divides the 4 of query"),
        ({"tokens": tokens.float()}, "tokens: expected int32 or int64, got a torch.float32"),
        ({"tokens": tokens[:1]}, "tokens: expected shape .2, 5., got a torch.int32 tensor of shape .1, 5."),
        ({"span": good["span"].long()}, "span: expected two contiguous int32, got a torch.int64"),
        ({"span": good["span"][:1]}, "span: expected two contiguous int32"),
        ({"span": good["span"].repeat(2)[::2]}, "span: .*not contiguous"),
        ({"mask": mask.float()}, "mask: expected bool"),
        ({"mask": mask[..., 1:]}, "mask: expected the batch"),
        ({"positions": torch.zeros(2, 2, dtype=torch.int64)}, "positions: expected shape .2, 1."),
        ({"positions": torch.zeros(2, 1)}, "positions: expected int32 or int64"),
        ({"sink": [part[1:] for part in good["sink"]]}, "sink: expected a contiguous float32 tensor of shape .4."),
        ({"sink": [part.half() for part in good["sink"]]}, "sink: expected a contiguous float32"),
        ({"lse": torch.zeros(2, 4, 2)}, "lse: expected a contiguous float32 tensor of shape .2, 4, 1."),
        ({"lse": torch.zeros(2, 4, 1).double()}, "lse: .*got a torch.float64"),
        ({"window": 3}, "window: expected positions"),
        ({"window": -1}, "window: expected at least 0"),
        ({"step": torch.tensor(1.0)}, "step: expected one int64"),
        ({"step": torch.zeros(2, dtype=torch.int64)}, "step: expected one int64"),
        ({"first": 1}, "maps: expected first . 2 layers to fit in 2, got first = 1"),
        ({"first": -1}, "maps: expected first"),
        ({"maps": good["maps"][..., 1:]}, "maps: unexpected shape"),
        ({"maps": good["maps"].double()}, "maps: expected float32"),
        ({"mass": good["mass"][0]}, "mass: unexpected number of dimensions"),
        ({"mass": good["mass"].half()}, "mass: expected float32"),
        ({"entropy": good["entropy"][:, :1]}, "entropy: expected first"),
        ({"mass": good["mass"][:2]}, "mass: expected the steps and layers of maps"),
        ({"entropy": good["entropy"].repeat(1, 2, 1, 1)}, "entropy: expected the steps and layers of maps"),
        ({"query": [part[:, :0] for part in query], "mask": None, "sink": []}, "query: expected at least one head"),
    ]
    for changes, message in wrong:
        with pytest.raises(RuntimeError, match=f"capture: {message}"):
            op(**{**good, **changes})


def test_capture_layers_on_a_cpu_refuses_a_step_outside_the_buffers() -> None:
    op = operator("carve_kernels::capture_layers")
    good = dict(zip([argument.name for argument in op._schema.arguments], capture_layers(), strict=True))
    for step, message in ((3, "step: expected a step below 3, got 3"), (-1, "step: expected a step of at least 0")):
        with pytest.raises(RuntimeError, match=message):
            op(**{**good, "step": torch.tensor(step)})
    with pytest.raises(RuntimeError, match="maps: expected stride 1"):
        op(**{**good, "maps": good["maps"].transpose(-1, 0).contiguous().transpose(-1, 0)})


def test_capture_backward_refuses_what_it_cannot_read() -> None:
    op = operator("carve_kernels::capture_backward")
    good = dict(zip([argument.name for argument in op._schema.arguments], capture_backward(), strict=True))
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"key": good["key"].half()}, "key: expected the dtype of query"),
        ({"key": good["key"][..., 1:]}, "key: expected the batch and head size of query"),
        ({"tokens": good["tokens"][:1]}, "tokens: expected shape"),
        ({"maps": good["maps"].double()}, "maps: expected a contiguous float32 tensor of shape .2, 4, 1, 5."),
        ({"maps": good["maps"].mean(1)}, "maps: expected a contiguous float32 tensor of shape .2, 4, 1, 5."),
        ({"each": False}, "maps: expected a contiguous float32 tensor of shape .2, 1, 5."),
        ({"mass": good["mass"][:1]}, "mass: expected a contiguous float32"),
        ({"entropy": good["entropy"][:1]}, "entropy: expected a contiguous float32"),
        ({"to_query": good["to_query"].transpose(1, 3)}, "to_query: expected a contiguous float32"),
        ({"to_key": good["to_key"][:, :1]}, "to_key: expected a contiguous float32"),
        ({"to_sink": good["to_sink"][1:]}, "to_sink: expected a contiguous float32"),
        ({"sink": None}, "to_sink: expected none without a sink"),
    ]
    for changes, message in wrong:
        with pytest.raises(RuntimeError, match=f"capture: {message}"):
            op(**{**good, **changes})


def test_the_library_implements_capture_layers_and_python_does_not() -> None:
    if reason := extension.unavailable():
        pytest.skip(reason)
    dump = torch._C._dispatch_dump("carve_kernels::capture_layers")
    lines = dict(line.split(": ", 1) for line in dump.splitlines())
    assert "capture_cpu.cpp" in lines["CPU"]
    assert [key for key in lines if key.startswith("Composite")] == []
    if extension.architectures():
        assert "capture_cuda.cpp" in lines["CUDA"]
    else:
        assert "CUDA" not in lines


def test_no_operator_takes_a_stream() -> None:
    for name in registered():
        op = getattr(torch.ops.carve_kernels, name.removeprefix("carve_kernels::"))
        assert "stream" not in str(op.default._schema)


@pytest.mark.parametrize("name", ["carve_kernels::saliency", "carve_emulated::saliency"])
def test_saliency_refuses_what_it_cannot_read(name: str) -> None:
    op = operator(name)
    good = dict(zip([argument.name for argument in op._schema.arguments], saliency(), strict=True))
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"step": None, "query": good["query"][:1], "key": good["key"][:1], "sink": []}, "capture: maps: unexpected"),
        ({"each": True}, "capture: maps: unexpected"),
        ({"maps": torch.zeros(2, 2, 1, 1, 6)}, "capture: mass: expected the steps and layers"),
        (
            {name: torch.zeros(1, 3, 1, 1, *([6] * (name == "maps"))) for name in ("maps", "mass", "entropy")},
            "saliency: maps: expected one step of the layers of query",
        ),
        ({"general": torch.rand(2, 2, 6)}, "saliency: general: expected 1 or 1 steps"),
        ({"general": torch.rand(3, 1, 6)}, "saliency: general: expected the layers and tokens of task"),
        ({"layer_weights": torch.ones(3, dtype=torch.float64)}, "saliency: layer_weights: expected one for each layer"),
        ({"shapes": [2, 3, 7, 7]}, "saliency: shapes: 0 tokens and 7 pixels belong to no view"),
        ({"normalize": 5}, "saliency: normalize: expected a number"),
        ({"floor": 2}, "saliency: top, floor: expected one of them"),
        ({"keep": 0.0}, "saliency: keep: expected a share"),
        ({"selected": torch.zeros(8, 7, dtype=torch.bool)}, "saliency: mask: expected the shape of saliency"),
        ({"saliency": torch.zeros(56)}, "saliency: saliency: expected 2 dimensions"),
        ({"outcome": torch.zeros(7, dtype=torch.int64)}, "saliency: outcome: expected 6 numbers"),
    ]
    for changes, message in wrong:
        with pytest.raises(RuntimeError, match=message):
            op(**{**good, **changes})


def test_isa_cpu_refuses_unknown_instructions() -> None:
    op = operator("carve_kernels::isa_cpu")
    with pytest.raises(RuntimeError, match="expected a number up to 4"):
        op(5, torch.zeros(2, dtype=torch.int64))
    with pytest.raises(RuntimeError, match="expected two int64"):
        op(-2, torch.zeros(2))


def test_regions_cpu_refuses_what_it_cannot_read() -> None:
    op = operator("carve_kernels::regions_cpu")
    good = regions_cpu()
    wrong: list[tuple[int, Any, str]] = [
        (0, torch.zeros(5, 9, dtype=torch.float16), "dtype"),
        (0, torch.zeros(9, 5).T, "contiguous"),
        (0, torch.zeros(45), "dimensions"),
        (1, 0.0, "keep"),
        (1, float("nan"), "keep"),
        (2, 0, "top, floor"),
        (3, 1, "top, floor"),
        (2, -2, "top, floor"),
        (4, 6, "connectivity"),
        (5, 3, "score"),
        (6, 0, "min_size: expected at least 1"),
        (7, torch.zeros(9, 5, dtype=torch.bool), "shape"),
        (7, torch.zeros(5, 9), "dtype"),
        (8, torch.zeros(2, 3, dtype=torch.int64), "expected 4 numbers"),
        (8, torch.zeros(1, 4, dtype=torch.int64), "as many"),
        (9, torch.zeros(2), "dtype"),
        (10, torch.zeros(5, dtype=torch.int64), "6 numbers"),
    ]
    for index, value, message in wrong:
        with pytest.raises(RuntimeError, match=message):
            op(*good[:index], value, *good[index + 1 :])
    video = (torch.rand(2, 5, 9), *good[1:4], 6, *good[5:7], torch.zeros(2, 5, 9, dtype=torch.bool))
    with pytest.raises(RuntimeError, match="boxes: expected 6 numbers"):
        op(*video, *good[8:])
    with pytest.raises(RuntimeError, match="connectivity: expected 6 or 26 over frames, got 4"):
        op(*video[:4], 4, *video[5:], *good[8:])
    little = (*good[:8], torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, dtype=torch.float64), good[10])
    with pytest.raises(RuntimeError, match="at least 2 rows"):
        op(*little)
