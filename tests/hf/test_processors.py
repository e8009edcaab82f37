"""Processors without torchvision: the same numbers for images, and an error that names videos."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

from carve_kernels import CarveEngine, load
from carve_kernels.extras import needed_by
from carve_kernels.hf.processors import lacks_num2words, processor_of, video_parts, without_videos
from tests.hf.test_videos import write
from tests.support import tiny_models

ROOT = Path(__file__).resolve().parents[2]
SIZE = (90, 60)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save(*tiny_models.tiny_qwen2_5_vl(), tmp_path_factory.mktemp("qwen"))


@pytest.fixture(scope="module")
def older(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in the older format of the hub: image settings in a separate file, sizes as numbers of pixels."""
    folder = tiny_models.save(*tiny_models.tiny_qwen2_5_vl(), tmp_path_factory.mktemp("older"))
    settings = json.loads((folder / "processor_config.json").read_text())["image_processor"]
    size = settings.pop("size")
    settings |= {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}
    settings |= {"processor_class": "Qwen2_5_VLProcessor", "image_processor_type": "Qwen2VLImageProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    for name in ("processor_config.json", "chat_template.jinja"):
        (folder / name).unlink()
    return folder


@pytest.fixture
def no_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the video part is missing here; test_an_engine_without_torchvision has no torchvision at all."""

    def refuse(*_: Any, **__: Any) -> None:
        raise ImportError("Qwen2VLVideoProcessor requires the Torchvision library")

    monkeypatch.setattr(transformers.AutoVideoProcessor, "from_pretrained", refuse)


def test_an_engine_without_torchvision(checkpoint: Path, older: Path, tmp_path: Path) -> None:
    """In a process without torchvision; the numbers are those of the image processor on Pillow."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    image_processor = Qwen2VLImageProcessorPil.from_pretrained(str(checkpoint))
    expected = image_processor(images=[tiny_models.make_image(*SIZE)], return_tensors="pt")
    save_file(dict(expected), tmp_path / "expected.safetensors")
    tiny_models.make_image(*SIZE).save(tmp_path / "image.png")
    program = """
        import sys

        sys.modules["torchvision"] = None

        import torch
        from PIL import Image
        from safetensors.torch import load_file

        from carve_kernels import CarveEngine, load

        expected, image = load_file("expected.safetensors"), Image.open("image.png")
        for folder in sys.argv[1:]:
            model, processor = load(folder)
            assert type(processor.image_processor).__name__ == "Qwen2VLImageProcessorPil"
            engine = CarveEngine(model, processor, preset={"layers": [1, 2], "max_new_tokens": 2})
            result = engine(image, "what digit is red")
            assert sorted(result.entropy) == [1, 2] and len(result.refined_ids) == 2
            prompt = processor.apply_chat_template(
                [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "hello"}]}],
                add_generation_prompt=True,
            )
            inputs = processor(images=[image], text=[prompt], return_tensors="pt")
            assert all(torch.equal(inputs[name], value) for name, value in expected.items())
            print(result.answer_ids, result.refined_ids, result.entropy)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), checkpoint, older],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == second


@pytest.mark.usefixtures("no_torchvision")
@pytest.mark.parametrize("layout", ["checkpoint", "older"])
def test_the_processor_of_a_checkpoint(layout: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    folder = request.getfixturevalue(layout)
    _, processor = load(folder)
    assert isinstance(processor, transformers.Qwen2_5_VLProcessor) and not hasattr(processor, "video_processor")
    assert processor.chat_template == tiny_models.QWEN_TEMPLATE
    assert dict(processor.image_processor.size) == {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 64}
    processor.save_pretrained(tmp_path)
    assert type(processor_of(tmp_path, "qwen2_5_vl")).__name__ == "Qwen2_5_VLProcessor"
    saved = json.loads((tmp_path / "processor_config.json").read_text())
    assert saved["processor_class"] == "Qwen2_5_VLProcessor" and "video_processor" not in saved


@pytest.mark.usefixtures("no_torchvision")
@pytest.mark.parametrize("by_name", [True, False])
def test_a_video_is_refused_by_name(checkpoint: Path, by_name: bool) -> None:
    _, processor = load(checkpoint)
    video = torch.zeros(2, 3, 56, 56, dtype=torch.uint8)
    text = "<|vision_start|><|video_pad|><|vision_end|> what is this"
    with pytest.raises(ValueError, match=r"^videos: .* pip install torchvision"):
        processor(text=[text], videos=[video]) if by_name else processor(None, [text], [video])
    assert processor(text=["hello"], videos=None)["input_ids"]


@pytest.mark.usefixtures("no_torchvision")
def test_a_question_about_a_video_names_what_it_needs(checkpoint: Path, tmp_path: Path) -> None:
    clip = write(tmp_path / "clip.mp4", size=(64, 64))
    expected = r"^video: expected a processor of qwen2_5_vl with its video part, .* pip install torchvision, from the "
    with pytest.raises(ValueError, match=expected):
        CarveEngine(*load(checkpoint)).ask_video(clip, "what is this")
    with pytest.raises(ValueError, match=r"^video: expected a model that takes videos; llava takes images only$"):
        CarveEngine(*load("small")).ask_video(clip, "what is this")


def test_a_processor_that_needs_num2words_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.smolvlm import processing_smolvlm

    monkeypatch.setattr(processing_smolvlm, "num2words", None)
    assert lacks_num2words(transformers.SmolVLMProcessor) and not lacks_num2words(transformers.LlavaProcessor)
    monkeypatch.setattr(processing_smolvlm, "num2words", str)
    assert not lacks_num2words(transformers.SmolVLMProcessor)


def test_with_torchvision_the_processor_is_complete(checkpoint: Path) -> None:
    _, processor = load(checkpoint)
    assert type(processor) is transformers.Qwen2_5_VLProcessor and processor.video_processor is not None


def test_an_incompatible_torchvision_is_named() -> None:
    """As transformers reports it, at the first use of a name of this package that needs it."""
    message = r"^load needs transformers, .* \(operator torchvision::nms .* pip uninstall torchvision$"
    with pytest.raises(ImportError, match=message), needed_by("load"):
        raise ModuleNotFoundError("Could not import module 'PreTrainedModel'") from RuntimeError(
            "operator torchvision::nms does not exist"
        )


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("Qwen2VLProcessor", {}),
        ("LlavaOnevisionProcessor", {"num_image_tokens": 5}),
        # The video part is not the last one.
        ("LlavaNextVideoProcessor", {"patch_size": 14}),
        ("VideoLlavaProcessor", {"patch_size": 14}),
    ],
)
def test_any_processor_class_works_without_its_video_part(name: str, settings: dict[str, Any]) -> None:
    complete = getattr(transformers, name)
    (part,) = video_parts(complete)
    _, original = tiny_models.tiny_qwen2_vl()
    images_only = without_videos(complete)
    assert set(images_only.get_attributes()) == set(complete.get_attributes()) - {part}
    parts = [getattr(original, each) for each in images_only.get_attributes()]
    processor = images_only.from_args_and_dict(parts, settings)
    assert all(getattr(processor, each) is getattr(original, each) for each in images_only.get_attributes())
    assert not hasattr(processor, part) and all(getattr(processor, key) == value for key, value in settings.items())
    assert isinstance(processor, complete) and processor.to_dict()["processor_class"] == name
