"""Every operator under `carve_kernels::`, with arguments to call it with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import carve_kernels.ops.attention_operator
import carve_kernels.ops.saliency_operator  # noqa: F401  (they register the operators that call a backend by its name)
from carve_kernels.backends import cpu
from carve_kernels.backends.cuda.plan import contrast_scratch
from carve_kernels.backends.cuda.regions import scratch_bytes
from tests.emulator import emulator


def contrast_cpu() -> tuple[Any, ...]:
    shapes = [3, 5, 11, 7, 2, 2, 1, 3]
    return (
        torch.rand(2, 3, 19),
        torch.rand(2, 1, 19),
        torch.rand(2, dtype=torch.float64),
        torch.rand(3, dtype=torch.float64),
        shapes,
        0.1,
        False,
        3,
        torch.full((11 * 7 + 3,), float("nan")),
    )


def contrast_cuda() -> tuple[Any, ...]:
    *inputs, out = contrast_cpu()
    return (*inputs, torch.full((contrast_scratch(6, 19),), 255, dtype=torch.uint8), out)


def column_sums_cpu() -> tuple[Any, ...]:
    query, key = torch.randn(2, 4, 3, 16), torch.randn(2, 2, 9, 16)
    positions = torch.tensor([[5, 8, 6], [8, 3, 7]])
    mask, lse = torch.ones(2, 1, 3, 9, dtype=torch.bool), torch.full((2, 4, 3), 2.0)
    return query, key, mask, positions, torch.zeros(4), lse, 0.25, 30.0, 6, torch.full((2, 4, 9), float("nan"))


def regions_cpu() -> tuple[Any, ...]:
    saliency = torch.zeros(5, 9)
    saliency[1, 1:4] = 1.0
    saliency[3, 6] = 2.0
    return (
        saliency,
        4 / 45,
        2,
        0,
        4,
        1,
        1,
        torch.zeros(5, 9, dtype=torch.bool),
        torch.full((2, 4), -1),
        torch.zeros(2, dtype=torch.float64),
        torch.full((6,), -1),
    )


def regions_cuda() -> tuple[Any, ...]:
    *inputs, mask, boxes, scores, outcome = regions_cpu()
    scratch = torch.zeros(scratch_bytes((5, 9), 4), dtype=torch.uint8)
    return (*inputs, 2, scratch, mask, boxes, scores, outcome)


def capture_layers() -> tuple[Any, ...]:
    layers, batch, rows, keys, tokens = 2, 2, 1, 9, 5
    return (
        [torch.randn(batch, 4, rows, 32) for _ in range(layers)],
        [torch.randn(batch, 2, keys, 32) for _ in range(layers)],
        torch.arange(tokens, dtype=torch.int32).expand(batch, -1).contiguous(),
        torch.tensor([0, tokens - 1], dtype=torch.int32),
        torch.rand(batch, 1, rows, keys) < 0.7,
        None,
        [torch.randn(4) for _ in range(layers)],
        None,
        0.2,
        0.0,
        0,
        False,
        torch.tensor(1),
        0,
        torch.full((1 << 20,), 255, dtype=torch.uint8),
        torch.zeros(4096, dtype=torch.int32),
        torch.zeros(3, layers, batch, rows, tokens),
        torch.zeros(3, layers, batch, rows),
        torch.zeros(3, layers, batch, rows),
    )


def capture_layers_in() -> tuple[Any, ...]:
    return (*capture_layers(), "reference")


def capture_backward() -> tuple[Any, ...]:
    query, key, tokens, _, mask, positions, sinks, *_ = capture_layers()
    parts = torch.randn(2, 4, 1, 5), torch.randn(2, 1), torch.randn(2, 1)
    written = torch.zeros(2, 4, 1, 32), torch.zeros(2, 2, 9, 32), torch.zeros(4)
    return query[0], key[0], tokens, mask, positions, sinks[0], None, 0.2, 3.0, 0, True, *parts, *written


def attend_layer() -> tuple[Any, ...]:
    layers = capture_layers()
    query, key = (tensors[0].to(torch.bfloat16) for tensors in layers[:2])
    value = torch.randn(*key.shape[:3], 24, dtype=torch.bfloat16)
    output = torch.zeros(*query.shape[:3], 24, dtype=torch.bfloat16)
    _, _, tokens, span, mask, positions, sinks, _, *options = layers
    return (query, key, value, tokens, span, mask, positions, sinks[0], *options[:-3], output, *options[-3:])


def attend_layer_in() -> tuple[Any, ...]:
    return (*attend_layer(), "auto")


def attention_plan_cuda() -> tuple[Any, ...]:
    return [1, 28, 4, 4096, 128, 128, 1024], torch.full((6,), -1)


def saliency() -> tuple[Any, ...]:
    layers, tokens, size = 2, 6, (7, 8)
    given = list(capture_layers())
    mask, maps = torch.rand(1, 1, 1, 9) < 0.9, torch.zeros(1, layers, 1, 1, tokens)
    given[:3] = [query[:1] for query in given[0]], [key[:1] for key in given[1]], torch.arange(2, 8)[None]
    given[3:5], given[12] = [None, mask], torch.tensor(0)
    given[16:] = [maps, torch.zeros(1, layers, 1, 1), torch.zeros(1, layers, 1, 1)]
    general, weights = torch.rand(layers, 1, tokens), torch.rand(layers, dtype=torch.float64)
    numbers = (0.1, False, 3, 0.4, 2, 0, 4, 1, 1, 64)
    buffers = (torch.zeros(size, dtype=torch.bool), torch.full((2, 4), -1), torch.zeros(2, dtype=torch.float64))
    step_weights = torch.ones(1, dtype=torch.float64)
    pixels = torch.full(size, torch.nan)
    return (*given, general, weights, step_weights, [2, 3, *size], *numbers, pixels, *buffers, torch.full((6,), -1))


def saliency_in() -> tuple[Any, ...]:
    return (*saliency(), "reference")


def capture_plan_cuda() -> tuple[Any, ...]:
    return [6, 1, 28, 4, 1, 4096, 128, 1024, 2, 0, 1], torch.full((11,), -1)


def cuda_build() -> tuple[Any, ...]:
    return (torch.full((16,), -1),)


def cuda_versions() -> tuple[Any, ...]:
    return (torch.full((2,), -1),)


def isa_cpu() -> tuple[Any, ...]:
    return -2, torch.full((2,), -1)


SAMPLES: dict[str, Callable[[], tuple[Any, ...]]] = {
    "carve_emulated::capture_layers": capture_layers,
    "carve_emulated::attend_layer": attend_layer,
    "carve_emulated::attention_plan_cuda": attention_plan_cuda,
    "carve_emulated::capture_plan_cuda": capture_plan_cuda,
    "carve_emulated::contrast_cuda": contrast_cuda,
    "carve_emulated::regions_cuda": regions_cuda,
    "carve_emulated::saliency": saliency,
    "carve_kernels::capture_backward": capture_backward,
    "carve_kernels::capture_layers": capture_layers,
    "carve_kernels::capture_layers_in": capture_layers_in,
    "carve_kernels::attend_layer_in": attend_layer_in,
    "carve_kernels::contrast_cpu": contrast_cpu,
    "carve_kernels::cuda_build": cuda_build,
    "carve_kernels::cuda_versions": cuda_versions,
    "carve_kernels::isa_cpu": isa_cpu,
    "carve_kernels::column_sums_cpu": column_sums_cpu,
    "carve_kernels::regions_cpu": regions_cpu,
    "carve_kernels::saliency": saliency,
    "carve_kernels::saliency_in": saliency_in,
}
# What an operator may leave as it is: a CPU uses no scratch, and tickets are 0 after every call.
KEPT: dict[str, frozenset[str]] = {
    "carve_emulated::capture_layers": frozenset({"tickets"}),
    "carve_emulated::attend_layer": frozenset({"tickets"}),
    "carve_kernels::attend_layer_in": frozenset({"scratch", "tickets"}),
    "carve_kernels::capture_layers": frozenset({"scratch", "tickets"}),
    "carve_kernels::capture_layers_in": frozenset({"scratch", "tickets"}),
    "carve_emulated::saliency": frozenset({"tickets", "boxes", "scores"}),
    "carve_kernels::saliency": frozenset({"scratch", "tickets", "boxes", "scores"}),
    "carve_kernels::saliency_in": frozenset({"scratch", "tickets", "boxes", "scores"}),
}


def operator(name: str) -> Any:
    namespace, short = name.split("::")
    if namespace == emulator.NAMESPACE:
        stage = short.partition("_")[0]
        emulated("capture" if stage in ("attend", "attention") else stage)
    elif not short.endswith("_in") and (reason := cpu.unavailable()):
        pytest.skip(reason)
    return getattr(getattr(torch.ops, namespace), short).default


def emulated(stage: str) -> None:
    if emulator.compiler() is None:
        pytest.skip("the emulator of CUDA needs a C++ compiler")
    emulator.library(stage)
