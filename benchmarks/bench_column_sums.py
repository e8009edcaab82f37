"""The attention that each key of a causal layer gets, beside the layer's own fused attention: seconds and memory."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import torch
import typer
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.support import lines, memory
from benchmarks.support.answers import check_maps, check_truth
from benchmarks.support.commands import (
    Csv,
    Markdown,
    Output,
    Plot,
    Quick,
    Threads,
    check_output,
    progress,
    reporting,
    without_goals,
)
from benchmarks.support.lines import Goal, Line, line, over
from benchmarks.support.timing import Run, no_preparation, paired
from carve_kernels import column_sums
from carve_kernels.selfcheck.planted import Case, planted

SDPA, WITH_SUMS, WITHOUT_LSE, EAGER = "sdpa", "sdpa + sums", "sdpa + sums, no lse", "eager"
GOAL = Goal(WITH_SUMS, 1.6, most=True)
# Heads, key heads and head size of a layer.
GEOMETRIES = {"qwen2.5-vl-7b": (28, 4, 128), "llava-1.5-7b": (32, 32, 128)}
LENGTH, LONG = 2048, 8192


class Layer(NamedTuple):
    """The inputs of a layer's attention; `repeated` are the keys of each query head, as sdpa gets them."""

    query: Tensor
    key: Tensor
    repeated: Tensor
    value: Tensor
    positions: Tensor
    scale: float


def layer_of(geometry: str, length: int) -> Layer:
    heads, key_heads, size = GEOMETRIES[geometry]
    case = Case(
        batch=1, query_heads=heads, key_heads=key_heads, rows=length, keys=length, size=size, tokens=0, view="all",
        dtype=torch.bfloat16, gain=0.5,
    )  # fmt: skip
    (query, key, _), options = planted(case)
    key = key.contiguous()
    repeated = key.repeat_interleave(heads // key_heads, 1)
    value = torch.randn(repeated.shape, generator=torch.Generator().manual_seed(1)).to(key.dtype)
    return Layer(query, key, repeated, value, torch.arange(length)[None], options["scale"])


def attend(layer: Layer) -> tuple[Tensor, Tensor]:
    """torch's fused attention, which returns its log-sum-exp under a private name."""
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    output, lse = fused(layer.query, layer.repeated, layer.value, 0.0, True, scale=layer.scale)
    return output, lse


def sums(layer: Layer, lse: Tensor | None = None) -> Tensor:
    return column_sums(
        layer.query, layer.key, scale=layer.scale, positions=layer.positions, lse=lse, heads="sum", check=False
    )


def sdpa(layer: Layer) -> Tensor:
    return scaled_dot_product_attention(
        layer.query, layer.repeated, layer.value, is_causal=True, scale=layer.scale
    )  # fmt: skip


def with_sums(layer: Layer) -> Tensor:
    return sums(layer, attend(layer)[1])


def without_lse(layer: Layer) -> Tensor:
    sdpa(layer)
    return sums(layer)


def eager(layer: Layer) -> Tensor:
    """The whole matrix of probabilities, and the output by it."""
    future = torch.ones(layer.query.shape[2], layer.key.shape[2], dtype=torch.bool).triu(1)
    scores = (layer.query @ layer.repeated.mT * layer.scale).masked_fill_(future, -torch.inf)
    probabilities = scores.softmax(-1, dtype=torch.float32).to(scores.dtype)
    torch.matmul(probabilities, layer.value)
    return probabilities.sum((1, 2), dtype=torch.float32)


WAYS: dict[str, Callable[[Layer], Tensor]] = {
    SDPA: sdpa,
    WITH_SUMS: with_sums,
    WITHOUT_LSE: without_lse,
    EAGER: eager,
}
TIMED = (SDPA, WITH_SUMS, WITHOUT_LSE)


def truth(layer: Layer) -> Tensor:
    """The sums [1, S] in float64, a head at a time."""
    total = torch.zeros(1, layer.key.shape[2], dtype=torch.float64)
    future = torch.ones(layer.query.shape[2], layer.key.shape[2], dtype=torch.bool).triu(1)
    for head in range(layer.query.shape[1]):
        scores = layer.query[0, head].double() @ layer.repeated[0, head].double().mT * layer.scale
        total += scores.masked_fill_(future, -torch.inf).softmax(-1).sum(0)
    return total


def check(layer: Layer) -> None:
    """Every way to the sums, and the outputs of the attention that they stand beside."""
    expected = truth(layer)
    check_truth("column sums", expected)
    for name in (WITH_SUMS, WITHOUT_LSE, EAGER):
        # Eager rounds scores and probabilities to bf16. Of fewer rows the last keys have few and small terms.
        relative, correlation = (0.1, 0.999) if name == EAGER else (1e-3, 1 - 1e-6)
        check_maps(name, WAYS[name](layer), expected, relative=relative, correlation=correlation)
    torch.testing.assert_close(attend(layer)[0], sdpa(layer), rtol=0, atol=0)


def measure(geometry: str, length: int, *, rounds: int) -> Line:
    """Seconds of a layer, after its answers were checked."""
    layer = layer_of(geometry, length)
    check(layer)
    # Eager's seconds, about ten times sdpa's, would be most of the command's.
    runs: dict[str, Run] = {name: lambda name=name: WAYS[name](layer) for name in TIMED}  # type: ignore[misc]
    seconds = paired(runs, rounds=rounds, before=no_preparation)
    labels = {"layer": geometry, "rows": length, "dtype": "bf16"}
    return line(f"Seconds of a layer's attention, and their ratio to {SDPA}", labels, over(seconds, SDPA), [GOAL],
                seconds=seconds)  # fmt: skip


def peaks(geometry: str, length: int, names: tuple[str, ...]) -> Line:
    """Resident bytes of a layer's attention above its inputs, each in a fresh process."""
    found = {
        name: memory.in_fresh_process(__spec__.name, {"name": name, "geometry": geometry, "length": length})
        for name in names
    }
    return line("Peak memory above the inputs, MiB", {"layer": geometry, "rows": length, "dtype": "bf16"}, {}, [],
                sizes=found)  # fmt: skip


def column_sums_command(
    quick: Quick = False,
    rounds: Annotated[int, typer.Option(min=3)] = 9,
    threads: Threads = None,
    output: Output = None,
    csv_file: Csv = None,
    plot_file: Plot = None,
    markdown: Markdown = None,
) -> None:
    """What the attention that each key gets costs beside sdpa, on a layer of 2,048 causal rows in bf16 on the CPU."""
    check_output("--markdown", markdown)
    geometries, length = list(GEOMETRIES), LENGTH
    long: tuple[int, ...] = (LONG,)
    if quick:
        geometries, length, long, rounds = geometries[:1], 64, (), 3
    with (
        reporting("column_sums", output, threads, lines.tables, csv_file, plot_file) as report,
        progress(len(geometries) + 1 + len(long)) as advance,
    ):
        report["settings"] = {"rounds": rounds}
        entries = []
        for geometry in geometries:
            entries.append(measure(geometry, length, rounds=rounds))
            advance(geometry)
        entries.append(peaks(geometries[0], length, tuple(WAYS)))
        advance("memory")
        for longer in long:
            entries.append(peaks(geometries[0], longer, (SDPA, WITH_SUMS)))
            advance(f"memory of {longer} rows")
        report["results"] = without_goals(entries) if quick else entries
    if markdown is not None:
        markdown.write_text(lines.markdown(report))


def peak_here(task: dict[str, Any]) -> int:
    torch.set_num_threads(1)
    way, small = WAYS[task["name"]], layer_of(task["geometry"], 64)
    way(small)
    layer = layer_of(task["geometry"], task["length"])
    return memory.peak_resident(lambda: way(layer))


if __name__ == "__main__":
    print(json.dumps(peak_here(json.loads(sys.argv[1]))))
