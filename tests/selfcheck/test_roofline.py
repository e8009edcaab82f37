"""The roofline: predictions and their bounds, opponents counted by their operators, the share of a decode step."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import bench_capture, roofline
from benchmarks import opponent_work as opponents
from benchmarks.__main__ import app
from benchmarks.support.cases import GEOMETRIES, Case, problem
from carve_kernels import selfcheck
from carve_kernels.selfcheck.roofline import (
    GPUS,
    GRAPH_LAUNCH,
    GRAPH_START,
    LAUNCH,
    REACHED,
    START,
    UNITS,
    Gpu,
    gpu_of,
    predict,
    work_of,
)
from carve_kernels.selfcheck.work import Work

PAGE = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "predicted.md"
GPU = Gpu("one", bandwidth=1e12 / REACHED, matrix=1e14, vector=1e13)
CASE = Case("smolvlm", 96, 3, "bf16")


def counts_its_work(stage: str, backend: str) -> bool:
    try:
        return hasattr(importlib.import_module(f"carve_kernels.selfcheck.{backend}_work"), f"{stage}_work")
    except ModuleNotFoundError:
        return False


@pytest.mark.parametrize(
    ("work", "unit", "graphs", "seconds", "bound"),
    [
        (Work(6 * 10**7, 4 * 10**7, 0, 1), "matrix", False, 1e-4 + START + LAUNCH, "memory"),
        (Work(6 * 10**7, 4 * 10**7, 0, 0), "matrix", False, 1e-4, "memory"),
        (Work(1, 1, 10**10, 1), "matrix", False, 1e-4 + START + LAUNCH, "arithmetic"),
        (Work(1, 1, 10**10, 1), "vector", True, 1e-3 + GRAPH_START + GRAPH_LAUNCH, "arithmetic"),
        (Work(0, 0, 0, 7), "matrix", False, START + 7 * LAUNCH, "launch"),
        (Work(0, 0, 0, 7), "matrix", True, GRAPH_START + 7 * GRAPH_LAUNCH, "launch"),
    ],
)
def test_launches_are_added_to_the_longer_of_two_times(
    work: Work, unit: Any, graphs: bool, seconds: float, bound: str
) -> None:
    found = predict(work, GPU, unit=unit, graphs=graphs)
    assert found.seconds == pytest.approx(seconds, rel=1e-12) and found.bound == bound
    assert found.seconds == found.launch + max(found.memory, found.arithmetic)


def test_empty_kernels_take_what_an_h100_measured() -> None:
    """Microseconds of 1, 2 and 3 kernels that do nothing: launched by C++, and in a graph."""
    for graphs, measured in ((False, (3.55, 5.92)), (True, (4.03, 5.28, 7.33))):
        for count, wanted in enumerate(measured, 1):
            found = predict(Work(0, 0, 0, count), GPUS["H100"], graphs=graphs).seconds
            assert found == pytest.approx(1e-6 * wanted, abs=0.3e-6)


def test_an_unknown_unit_is_refused() -> None:
    with pytest.raises(ValueError, match="unit: expected one of 'matrix', 'vector'"):
        predict(Work(1, 1, 1, 1), GPU, unit="bandwidth")  # type: ignore[arg-type]


def device(name: str, capability: tuple[int, int], **more: int) -> Any:
    return SimpleNamespace(name=name, major=capability[0], minor=capability[1], **more)


def test_a_gpu_is_known_by_its_family_and_its_memory() -> None:
    known = gpu_of(device("NVIDIA H100 80GB HBM3", (9, 0)))
    assert known == GPUS["H100"]._replace(name="NVIDIA H100 80GB HBM3")
    # 5120 bits at 2619 MHz, two transfers a clock, are the 3.35 TB/s of the data sheet.
    measured = gpu_of(device("NVIDIA H100 80GB HBM3", (9, 0), memory_clock_rate=2_619_000, memory_bus_width=5120))
    assert measured is not None and measured.bandwidth == pytest.approx(3.35e12, rel=2e-3)
    relative = gpu_of(device("NVIDIA H200", (9, 0), memory_clock_rate=3_201_000, memory_bus_width=6144))
    assert relative is not None and relative.bandwidth > 4.8e12 and relative.matrix == GPUS["H100"].matrix


def test_an_unknown_gpu_has_no_bound_on_its_arithmetic_or_no_prediction() -> None:
    assert gpu_of(device("NVIDIA H200", (9, 0))) is None
    assert gpu_of(device("GPU of tomorrow", (13, 0))) is None
    found = gpu_of(device("GPU of tomorrow", (13, 0), memory_clock_rate=1_000_000, memory_bus_width=4000))
    assert found == ("GPU of tomorrow", 1e12, float("inf"), float("inf"))
    assert predict(Work(10**9, 0, 10**18, 1), found).bound == "memory"
    # JSON has no infinity.
    assert selfcheck.for_json(found) == {"name": "GPU of tomorrow", "bandwidth": 1e12, "matrix": None, "vector": None}


@pytest.mark.parametrize(
    ("stage", "backend"), [("capture", "reference"), ("capture", "nowhere"), ("regions", "triton")]
)
def test_a_backend_that_does_not_count_has_no_work(stage: str, backend: str) -> None:
    assert work_of(stage, backend, height=3, width=4) is None


def test_plain_torch_is_counted_operator_by_operator() -> None:
    left, right = torch.zeros(3, 5, 7), torch.zeros(3, 7, 2)
    index = torch.tensor([1, 1, 0])

    def run() -> None:
        product = left @ right
        (product.transpose(1, 2) + torch.zeros(1).expand(3, 2, 5))[:, :, index]

    found = opponents.counted(run)
    product = 3 * 5 * 2 * 4
    zeros, gathered = 4, 3 * 2 * 3 * 4
    assert found.operations == 2 * 3 * 5 * 7 * 2
    assert found.read_bytes == left.nbytes + right.nbytes + product + zeros + gathered + index.nbytes
    assert found.written_bytes == 2 * product + zeros + gathered
    assert found.launches == 4


@pytest.mark.parametrize("rows", [1, 3])
def test_the_idiom_is_counted_the_same_with_and_without_memory(rows: int) -> None:
    case = CASE._replace(rows=rows)
    real = problem(case)
    # The benchmark's keys are a slice of a longer cache, which does not change the bytes read.
    assert opponents.idiom(case) == opponents.counted(lambda: bench_capture.repeat(real))


def test_eager_is_what_transformers_does() -> None:
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import eager_attention_forward

    heads, key_heads, size = GEOMETRIES[CASE.geometry]
    query, key, value = (torch.randn(1, count, 40, size) for count in (heads, key_heads, key_heads))
    mask = torch.zeros(1, 1, 40, 40).masked_fill(torch.ones(40, 40).triu(1).bool(), -1e9)
    module = SimpleNamespace(num_key_value_groups=heads // key_heads, training=False)

    def theirs() -> Any:
        return eager_attention_forward(module, query, key, value, mask, scaling=0.1)

    def ours() -> Any:
        return opponents.eager_attention(query, key, value, mask, 0.1)

    for part, wanted in zip(ours(), theirs(), strict=True):
        assert torch.equal(part, wanted)
    assert opponents.counted(ours) == opponents.counted(theirs)


def test_flash_is_half_of_eager() -> None:
    heads, key_heads, size = GEOMETRIES[CASE.geometry]
    found = opponents.flash(CASE)
    whole = opponents.eager(CASE, CASE.length)
    assert found.operations / whole.operations == pytest.approx((CASE.length + 1) / (2 * CASE.length))
    assert found.read_bytes == 2 * CASE.length * size * (heads + 2 * key_heads)
    assert found.written_bytes == CASE.length * heads * (2 * size + 4)


def test_the_decode_step_is_that_of_the_model() -> None:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLTextModel

    text = Qwen2_5_VLConfig(
        text_config={
            "hidden_size": roofline.HIDDEN,
            "intermediate_size": roofline.INNER,
            "num_hidden_layers": 1,
            "num_attention_heads": GEOMETRIES[roofline.HEADLINE].heads,
            "num_key_value_heads": GEOMETRIES[roofline.HEADLINE].key_heads,
            "vocab_size": roofline.VOCABULARY,
        }
    ).text_config
    with torch.device("meta"):
        layer = Qwen2_5_VLTextModel(text).layers[0]
    weights = sum(part.numel() for part in layer.parameters()) * roofline.DEPTH + roofline.VOCABULARY * roofline.HIDDEN
    found = roofline.decode_step(4096)
    cache = roofline.DEPTH * 2 * 4096 * 4 * 128 * 2
    # Biases and norms are a ten-thousandth.
    assert found.read_bytes - cache == pytest.approx(2 * weights, rel=1e-4)
    assert weights + roofline.VOCABULARY * roofline.HIDDEN == pytest.approx(7.6e9, rel=5e-3)


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_six_layers_take_less_than_a_hundredth_of_a_decode_step(backend: str, gpu: str) -> None:
    if not counts_its_work("capture", backend):
        pytest.skip(f"{backend} does not count its work")
    case = Case(roofline.HEADLINE, roofline.HEADLINE_LENGTH, 1, "bf16")
    step = predict(roofline.decode_step(case.length), GPUS[gpu]).seconds
    (way,) = (way for way in roofline.captures(case) if backend in way.name)
    assert way.work.launches == 2
    launched, graph = (predict(way.work, GPUS[gpu], unit=way.unit, graphs=graphs) for graphs in (False, True))
    assert 1e-4 * step < graph.seconds <= launched.seconds < 1e-2 * step
    # In a graph, even without any overlap.
    assert graph.memory + graph.arithmetic + graph.launch < 1.2e-2 * step


@pytest.mark.parametrize(("stage", "backend"), UNITS)
def test_every_kernel_that_counts_has_a_line(stage: str, backend: str) -> None:
    if not counts_its_work(stage, backend):
        pytest.skip(f"{backend} does not count the work of {stage}")
    found = roofline.measure(["smolvlm"], [512], lambda _done: None)
    lines = [entry for entry in found if entry["way"].startswith(f"{stage}, {backend}")]
    assert lines
    for entry in lines:
        assert min(entry["work"].values()) >= 0 and entry["work"]["read_bytes"] and entry["work"]["launches"]
        assert set(entry["predicted"]) == set(GPUS)


def test_the_command_writes_what_it_predicts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "work_of", lambda *_args, lse=False, **_sizes: Work(10**6, 10**3, 10**6, 2 - lse))
    files = tmp_path / "roofline.json", tmp_path / "roofline.md"
    words = ["--geometry", "smolvlm", "--length", "8192", "--output", str(files[0]), "--markdown", str(files[1])]
    result = CliRunner().invoke(app, ["roofline", *words])
    assert result.exit_code == 0, result.output
    report = json.loads(files[0].read_text())
    # No case of this geometry was measured.
    assert {entry["table"] for entry in report["results"]} == {"decode", "capture", "pixels"}
    # Two backends and three opponents for each number of rows.
    assert len([entry for entry in report["results"] if entry["table"] == "capture"]) == 3 * (2 + 3)
    assert report["gpus"]["H100"]["bandwidth"] == 3.35e12
    page = files[1].read_text()
    titles = [line for line in page.splitlines() if line.startswith("### ")]
    assert len(titles) == 3 and all("Predicted, not timed" in title for title in titles)
    assert "| capture, cuda | 1 | 1 | 2 | 6.45 launch; graph 6.05 launch (0.08%) |" in page
    assert "predicted, not timed" in result.output


def page() -> tuple[str, str, str]:
    """The docs before the tables, the tables, and the docs after them."""
    text = PAGE.read_text(encoding="utf-8")
    start = text.index("### Predicted, not timed: ")
    end = text.find("\n## ", start)
    return text[:start], text[start:] if end < 0 else text[start:end], "" if end < 0 else text[end:]


def predicted() -> str:
    found = roofline.measure(list(GEOMETRIES), [512, 4096, 8192, 32768], lambda _done: None)
    return roofline.markdown({"results": found})


def test_the_docs_show_what_the_kernels_count() -> None:
    """After an intended change: `python -m tests.selfcheck.test_roofline` rewrites the tables; check the prose too."""
    for stage, backend in UNITS:
        if not counts_its_work(stage, backend):
            pytest.skip(f"{backend} does not count the work of {stage}")
    assert page()[1].rstrip() == predicted().rstrip()


if __name__ == "__main__":
    before, _, after = page()
    PAGE.write_text(f"{before}{predicted().rstrip()}\n{after}", encoding="utf-8")
