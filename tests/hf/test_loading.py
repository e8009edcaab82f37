"""Loading a checkpoint directory, and errors for missing or broken files before weights are read."""

from __future__ import annotations

import json
import re
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from carve_kernels import AttentionMaps, CarveEngine, Preset, load
from carve_kernels.hf import loading, processors
from carve_kernels.hf.engine.cache import memory_of
from carve_kernels.hf.inputs import open_image
from carve_kernels.hf.loading import preset_of_checkpoint
from tests.support import tiny_models


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save(*tiny_models.tiny_llava(), tmp_path_factory.mktemp("llava"))


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))


@pytest.fixture
def no_weights_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the weights were read")

    monkeypatch.setattr(loading.AutoModelForImageTextToText, "from_pretrained", refuse)


@pytest.mark.parametrize("family", [tiny_models.tiny_llava, tiny_models.tiny_qwen2_vl, tiny_models.tiny_qwen2_5_vl])
def test_a_loaded_model_answers_like_the_saved_one(
    family: Callable[[], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = family()
    tiny_models.save(model, processor, tmp_path)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    loaded, its_processor = load(tmp_path)
    assert loaded.name_or_path == str(tmp_path)
    assert not loaded.training
    assert loaded.dtype == torch.float32
    assert type(its_processor) is type(processor)
    inputs = tiny_models.inputs_for(processor, [tiny_models.make_image(90, 60)], ["what digit is red"])
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


def test_dtype_and_device(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[Any] = []
    to = torch.nn.Module.to
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, device: moved.append(device) or to(self, device))
    for name, dtype in (("bf16", torch.bfloat16), (torch.bfloat16, torch.bfloat16), ("torch.half", torch.float16)):
        assert load(checkpoint, dtype=name, device="cpu")[0].dtype == dtype
    assert moved == [torch.device("cpu")] * 3


@pytest.mark.parametrize("dtype", ["fp8", "int8", torch.int8, torch.complex64, None, 16, "Float16", ""])
def test_an_unknown_dtype_is_refused(checkpoint: Path, dtype: Any) -> None:
    with pytest.raises(ValueError, match=r"^dtype: .*float32.*fp16"):
        load(checkpoint, dtype=dtype)


@pytest.mark.parametrize(
    ("device", "kind"),
    [*((name, ValueError) for name in ("cuda:99", "nowhere", "meta", "hpu", "vulkan", "", 99)), (True, TypeError)],
)
def test_an_unavailable_device_is_refused(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, device: Any, kind: type[Exception]
) -> None:
    monkeypatch.setattr(loading.AutoModelForImageTextToText, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(kind, match=r"^device: .*cpu"):
        load(checkpoint, device=device)


def test_a_tilde_is_the_users_folder(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").symlink_to(checkpoint, target_is_directory=True)
    model, processor = load("~/model")
    tiny_models.make_image(60, 40).save(tmp_path / "a.png")
    (tmp_path / "mine.json").write_text('{"keep": 0.25, "layers": [1], "max_new_tokens": 1}')
    engine = CarveEngine(model, processor, profile="~/mine.json", memory="~/maps")
    result = engine(Path("~/a.png"), "what digit is red")
    assert engine.preset.keep == 0.25 and len(list((tmp_path / "maps").iterdir())) == 1
    result.task.save("~/task.safetensors")
    assert AttentionMaps.load("~/task.safetensors").layers == (1,) and not (tmp_path / "~").exists()


@pytest.mark.parametrize("url", ["https://huggingface.co/Org/Name", "s3://bucket/x.png", "data:image/png;base64,AAAA"])
def test_a_url_is_refused(url: str) -> None:
    for name, call in (("model", load), ("image", open_image), ("memory", memory_of), ("path", AttentionMaps.load)):
        with pytest.raises(ValueError, match=rf"^{name}: .*{re.escape(url)} is a URL"):
            call(url)


def _unlink(*names: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return spoil


def _write(name: str, text: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / name).write_text(text)

    return spoil


def _family(name: str | None) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "model_type": name}))

    return spoil


def _truncate(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def _pickle(folder: Path) -> None:
    from safetensors.torch import load_file

    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def _index(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "one.safetensors")
    shards = {"a": "one.safetensors", "b": "two.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))


FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "no directory": (shutil.rmtree, "checkpoint is missing"),
    "no config": (_unlink("config.json"), r"no config\.json"),
    "broken config": (_write("config.json", "{"), r"config\.json cannot be read as JSON"),
    "config of another shape": (_write("config.json", "[]"), r"JSON object in .*config\.json, got list"),
    "other family": (_family("bert"), "takes images and text, .*qwen2_5_vl.* says 'bert'"),
    "no family": (_family(None), "says None"),
    "no weights": (_unlink("model.safetensors"), r"model\.safetensors is missing or not"),
    "half a file": (_truncate, r"model\.safetensors is missing or not a complete safetensors file"),
    "a pointer": (
        _write("model.safetensors", "version https://git-lfs"),
        "is missing or not a complete safetensors file",
    ),
    "a missing shard": (_index, r"two\.safetensors is missing or not"),
    "pickles": (_pickle, "pickles .* allow_pickle=True"),
    "no processor": (_unlink("processor_config.json"), "processor"),
    "no tokenizer": (_unlink("tokenizer.json", "tokenizer_config.json"), "processor in .* cannot be loaded"),
    "broken profile": (_write("carve.json", "[1]"), r"JSON object in .*carve\.json, got list"),
}


@pytest.mark.usefixtures("no_weights_read")
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_reported_before_weights_are_read(copy: Path, fault: str) -> None:
    spoil, message = FAULTS[fault]
    spoil(copy)
    with pytest.raises(ValueError, match=message):
        load(copy)


def test_a_file_is_not_a_directory(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json is a file"):
        load(checkpoint / "config.json")


def test_pickles_load_if_allowed(copy: Path) -> None:
    expected = load(copy)[0].state_dict()
    _pickle(copy)
    loaded = load(copy, allow_pickle=True)[0].state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in expected.items())


def test_weights_that_lack_a_tensor(copy: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(copy / "model.safetensors")
    name = next(name for name in weights if name.endswith("layers.2.self_attn.q_proj.weight"))
    del weights[name]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lack 1 tensor.*layers\.2\.self_attn\.q_proj"):
        load(copy)


@pytest.mark.usefixtures("no_weights_read")
def test_a_folder_without_a_processor_names_its_file(checkpoint: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)
    (copy / "processor_config.json").unlink()
    expected = rf"^model: {copy} has no processor_config\.json or preprocessor_config\.json; copy all of its files$"
    with pytest.raises(ValueError, match=expected):
        load(copy)


@pytest.mark.usefixtures("no_weights_read")
def test_a_processor_that_needs_torchvision(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ImportError("Qwen2VLVideoProcessor requires the Torchvision library")

    monkeypatch.setattr(processors.AutoProcessor, "from_pretrained", refuse)
    with pytest.raises(ImportError, match="pip install torchvision"):
        load(checkpoint)


def test_profile(tmp_path: Path) -> None:
    assert preset_of_checkpoint(tmp_path) is None
    (tmp_path / "carve.json").write_text('{"layers": [0]}')
    assert preset_of_checkpoint(tmp_path) == Preset(layers=(0,))
    (tmp_path / "carve.json").write_text("{")
    with pytest.raises(ValueError, match=r"carve\.json cannot be read as JSON"):
        preset_of_checkpoint(tmp_path)
