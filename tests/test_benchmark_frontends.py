"""Programs of others are imported from a folder, checked against ours and timed in turns; here they are planted."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import bench_frontends
from benchmarks.support import frontends, programs
from benchmarks.support.answers import WrongAnswer
from benchmarks.support.models import Shape
from tests.support import tiny_models
from tests.support.bench import run
from tests.test_benchmark_faults import untimed

# Programs with the files and names of the release and of ViCrop, which call ours and then change what it returns.
RELEASE = {
    "carve/__init__.py": "from .pipeline import carve\n",
    "carve/pipeline.py": """
from dataclasses import replace
from carve_kernels.frontends import release
def carve(model, processor, image, question, **options):
    inputs = processor([image], [processor.image_token + " a"], return_tensors="pt")
    assert processor.image_processor(images=[image])["pixel_values"].ndim and inputs.to("cpu")
    found = release.carve(model, processor._processor, image, question, **options)
    return {change}
""",
}
VICROP = {
    "run.py": """
from PIL import Image
import datasets
from llava_methods import *
from utils import *
from info import *
def vicrop_qa(model_name, method_name, image_path, question, model, processor, short_question):
    inputs = processor("<image> a", Image.open(image_path), return_tensors="pt", padding=True)
    inputs = inputs.to(model.device, torch.bfloat16)
    assert inputs["pixel_values"].dtype == model.dtype and inputs["input_ids"].shape[1] == 577
    answer, both, box = vicrop.vicrop_qa(
        model_name, method_name, image_path, question, model, processor._processor, short_question,
        layer=llava_methods.ATT_LAYER,
    )
    return {answers}
import llava_methods
""",
    "llava_methods.py": """
import torch
from carve_kernels.frontends import vicrop
ATT_LAYER = 14
def rel_attention_llava(image, prompt, general_prompt, model, processor):
    found = vicrop.rel_attention_llava(image, prompt, general_prompt, model, processor._processor, layer=ATT_LAYER)
    return {map}
""",
    "utils.py": """
import torchvision.transforms.functional as TF
from skimage.measure import block_reduce
from carve_kernels.frontends.vicrop import bbox_from_att_image_adaptive
""",
    "info.py": "NAMES = {{}}\n",
}
HONEST = {"change": "found", "answers": "answer, both, box", "map": "found"}


@pytest.fixture(autouse=True)
def qwen_vl_utils(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "qwen_vl_utils", ModuleType("qwen_vl_utils"))


@pytest.fixture(autouse=True, scope="module")
def small_sizes() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frontends, "SIZES", {"llava": ((336, 336),), "qwen2_5": ((140, 112),)})
        patch.setattr(bench_frontends, "SIZES", frontends.SIZES)
        yield
    frontends._subject.cache_clear()


def planted(folder: Path, **changes: str) -> tuple[str, ...]:
    """The options of two folders with programs."""
    for name, files in (("release", RELEASE), ("vicrop", VICROP)):
        for file, text in files.items():
            (folder / name / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / name / file).write_text(text.format(**{**HONEST, **changes}))
    return "--release", str(folder / "release"), "--vicrop", str(folder / "vicrop")


def test_both_programs_are_timed_with_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frontends, "in_fresh_process", lambda _, task: frontends.measure_here(task)._asdict())
    files = tmp_path / "found.json", tmp_path / "found.csv", tmp_path / "found.md"
    words = "--output", str(files[0]), "--csv", str(files[1]), "--markdown", str(files[2])
    modules = set(sys.modules)
    result = run("frontends", *planted(tmp_path), *words)
    assert result.exit_code == 0, result.output
    assert not {"run", "utils", "info", "llava_methods"} & (set(sys.modules) - modules)
    lines = json.loads(files[0].read_text())["results"]
    tables = [line["table"] for line in lines]
    assert tables.count("release: ms") == 4 and tables.count("peak memory of one call: MiB of tensors") == 3
    assert [line["labels"]["version"] for line in lines[:4]] == list(bench_frontends.VERSIONS)
    for line in lines:
        assert line["ratios"]["program / ours"]["median"] > 0
        assert all(set(line[part]) >= {"program", "ours"} for part in ("seconds", "bytes") if line[part])
    with files[1].open(newline="") as file:
        measures = {row["measure"] for row in csv.DictReader(file)}
    assert measures == {"seconds", "ratio", "bytes"}
    assert "### ViCrop, map and box: ms" in files[2].read_text()


WRONG = {
    "saliency": ("change", "replace(found, sum_att_map=found.sum_att_map[:, ::-1])", "maps within"),
    "nearly the saliency": ("change", "replace(found, sum_att_map=found.sum_att_map * 1.0001)", "maps within"),
    "NaN": ("change", "replace(found, sum_att_map=found.sum_att_map * float('nan'))", "expected a map with a peak"),
    "mask": ("change", "replace(found, mask_map=1 - found.mask_map)", "the same mask"),
    "refined image": (
        "change",
        "replace(found, refined_image=found.refined_image.rotate(180))",
        "the same refined image",
    ),
    "box": ("change", "replace(found, bbox=(0, 0, 1, 1))", "the same box"),
    "answer": ("change", "replace(found, original_answer='no')", "the same answer"),
    "refined answer": ("change", "replace(found, refined_answer='no')", "the same refined answer"),
    "map": ("map", "found.T", "maps within"),
    "no array": ("map", "1 / 0", "its program raised ZeroDivisionError"),
    "answer of ViCrop": ("answers", "answer + ' no', both, box", "the same answer"),
    "box of ViCrop": ("answers", "answer, both, (0, 0, 1, 1)", "the same box"),
}


@pytest.mark.parametrize("fault", WRONG)
def test_a_program_with_another_answer_is_one_error(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part, change, word = WRONG[fault]
    options = planted(tmp_path, **{part: change})
    given = options[:2] if part == "change" else options[2:]
    if part == "change":
        monkeypatch.setattr(bench_frontends, "paired", untimed)
    result = run("frontends", *given, "--part", "seconds", "--version", "v4")
    assert result.exit_code == 1
    assert word in result.output and "Traceback" not in result.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "--release, --vicrop"),
        (("--release", "nowhere"), "carve/pipeline.py"),
        (("--vicrop", "nowhere"), "run.py"),
        (("--release", "nowhere", "--version", "v5"), "--version"),
        (("--release", "nowhere", "--model", "nowhere", "--hidden", "128"), "--hidden"),
        (("--release", "nowhere", "--model", "nowhere"), "--model"),
    ],
)
def test_what_cannot_be_measured_is_refused(words: tuple[str, ...], message: str) -> None:
    result = run("frontends", *words)
    assert result.exit_code == 2
    assert message in result.output


def test_pixels_at_the_threshold_may_differ() -> None:
    saliency = np.linspace(0, 1, 100)
    # The 80th percentile is between these two.
    saliency[79:81] = 0.8, 0.8 + 1e-6
    saliency = saliency.reshape(10, 10)
    mask = (saliency >= np.percentile(saliency, 80)).astype(np.uint8)
    image = SimpleNamespace(tobytes=lambda: b"")
    found = {
        "sum_att_map": saliency, "bbox": (0, 8, 10, 10), "refined_image": image, "original_answer": "a",
        "refined_answer": "b",
    }  # fmt: skip
    theirs, ours = SimpleNamespace(**found, mask_map=mask), SimpleNamespace(**found, mask_map=mask.copy())
    assert bench_frontends.same_results("release", theirs, ours)["other pixels"] == 0
    ours.mask_map[8, 0] = 0
    assert bench_frontends.same_results("release", theirs, ours)["other pixels"] == 1
    ours.mask_map[9, 5] = 0
    with pytest.raises(WrongAnswer, match="got 1 other pixels of 100"):
        bench_frontends.same_results("release", theirs, ours)


def test_programs_are_timed_on_a_checkpoint(tmp_path: Path) -> None:
    model, processor = frontends.Source("llava", Shape(2, 128, "float32")).created("float32")
    model.save_pretrained(tmp_path / "mine")
    processor.save_pretrained(tmp_path / "mine")
    words = "--model", str(tmp_path / "mine"), "--part", "seconds", "--version", "v4"
    result = run("frontends", *planted(tmp_path), *words, "--output", str(tmp_path / "found.json"))
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "found.json").read_text())
    assert report["settings"]["model"] == "mine" and "hidden" not in report["settings"]
    assert [line["table"] for line in report["results"]] == [
        "release: ms", "ViCrop, map and box: ms", "ViCrop, both answers: ms",
    ]  # fmt: skip
    assert report["results"][0]["labels"]["family"] == "llava"


def test_a_checkpoint_that_the_programs_cannot_read_is_refused(tmp_path: Path) -> None:
    path = str(tiny_models.save(*tiny_models.tiny_llava(), tmp_path / "tiny"))
    result = run("frontends", *planted(tmp_path), "--model", path)
    assert result.exit_code == 2
    assert "--model: the programs take the image token 32000" in " ".join(result.output.replace("│", " ").split())


def test_a_program_that_cannot_be_imported_is_named(tmp_path: Path) -> None:
    options = planted(tmp_path)
    (tmp_path / "vicrop" / "info.py").write_text("import no_such_module\n")
    before = list(sys.path)
    result = run("frontends", *options[2:])
    assert result.exit_code == 2
    assert "--vicrop" in result.output and "no_such_module" in result.output
    assert sys.path == before and "run" not in sys.modules


def test_a_missing_module_fails_where_it_is_called(tmp_path: Path) -> None:
    planted(tmp_path)
    missing = sys.modules.get("torchvision")
    program = programs.vicrop(tmp_path / "vicrop")
    assert sys.modules.get("torchvision") is missing
    if missing is None:
        with pytest.raises(ModuleNotFoundError, match="torchvision"):
            program.TF.resize(None)
    assert isinstance(program.llava_methods.ATT_LAYER, int)


def test_token_types_grow_with_the_prompt() -> None:
    class Model(torch.nn.Module):
        def forward(self, input_ids: Any, mm_token_type_ids: Any) -> Any:
            return mm_token_type_ids

    model: Callable[..., Any] = programs.adapt(Model())
    types = model(input_ids=torch.ones(1, 5), mm_token_type_ids=torch.tensor([[0, 1, 1]]))
    np.testing.assert_array_equal(types, [[0, 1, 1, 0, 0]])
