"""Finding a checkpoint by its directory, as "small", or by its id in the local hub cache; nothing is downloaded."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from carve_kernels import CarveEngine, Preset, load
from carve_kernels.hf.loading import find, preset_of_checkpoint
from carve_kernels.models import small
from tests.support import tiny_models
from tests.support.hub import put

ROOT = Path(__file__).resolve().parents[2]
REPO = "Org/Tiny"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_models.save(*tiny_models.tiny_llava(), tmp_path_factory.mktemp("llava"))
    (folder / "carve.json").write_text('{"layers": [1]}')
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.fixture
def snapshot(checkpoint: Path, cache: Path) -> Path:
    return put(checkpoint, cache, REPO)


def test_a_checkpoint_in_the_hub_cache(checkpoint: Path, snapshot: Path) -> None:
    model, processor = load(REPO)
    assert Path(model.name_or_path) == snapshot
    expected = load(checkpoint)[0].state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert preset_of_checkpoint(REPO) == Preset(layers=(1,))
    assert CarveEngine(model, processor).preset.layers == (1,)


def test_a_model_loaded_by_transformers_has_its_profile(snapshot: Path) -> None:
    model, processor = load(REPO)
    model.name_or_path = REPO
    assert CarveEngine(model, processor).preset.layers == (1,)
    # Its name may not be in the local cache.
    model.name_or_path = "Org/Elsewhere"
    assert CarveEngine(model, processor).preset.layers == "paper"


def test_a_directory_takes_precedence_over_an_id(
    checkpoint: Path, snapshot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert find(REPO).folder == snapshot
    shutil.copytree(checkpoint, REPO)
    assert find(REPO).folder == Path(REPO)
    assert load(REPO)[0].name_or_path == str(tmp_path / REPO)


def test_small_is_the_embedded_model_unless_given_as_a_path(
    checkpoint: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert find("small").folder == small()
    with pytest.raises(ValueError, match=r"^model: expected a checkpoint directory, \./small is missing"):
        find("./small")
    shutil.copytree(checkpoint, "small")
    put(checkpoint, cache, "small")
    model, processor = load("small", dtype="float32")
    assert Path(model.name_or_path) == small() and preset_of_checkpoint("small") == preset_of_checkpoint(small())
    for written in ("./small", "small/", Path("small")):
        assert find(written).folder == Path("small")
    # name_or_path is absolute, so the process may change its directory.
    model, processor = load(Path("small"))
    assert model.name_or_path == str(tmp_path / "small")
    monkeypatch.chdir(tmp_path.parent)
    assert CarveEngine(model, processor).preset.layers == (1,)


@pytest.mark.parametrize("name", ["Org/Other", "gpt2", "Org/Tiny.v2"])
def test_the_error_for_a_missing_id_has_the_command(snapshot: Path, name: str) -> None:
    with pytest.raises(ValueError, match=rf"^model: '{name}' is not a directory, .* with: hf download {name}$"):
        load(name)


@pytest.mark.parametrize("name", ["Org/Tiny/", "a/b/c", "/nowhere", "../Tiny", "~/Tiny", "Org/..Tiny", "Org\\Tiny"])
def test_an_invalid_id_is_a_path(snapshot: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"^model: expected a checkpoint directory, .* is missing$"):
        load(name)


def test_a_path_is_never_an_id(snapshot: Path) -> None:
    with pytest.raises(ValueError, match=r"^model: expected a checkpoint directory, Org/Tiny is missing$"):
        load(Path(REPO))


@pytest.mark.parametrize(
    ("name", "error"), [(None, TypeError), (3, TypeError), (b"Org/Tiny", TypeError), ("", ValueError)]
)
def test_invalid_names(name: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"^model: expected a "):
        load(name)


def test_the_environment_sets_the_cache(checkpoint: Path, tmp_path: Path) -> None:
    program = "from carve_kernels.hf.loading import find; print(find('Org/Tiny').folder)"
    folder = put(checkpoint, tmp_path / "home/hub", REPO)
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "HF_HOME": str(tmp_path / "home")},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == str(folder), done.stderr


def dangling(name: str) -> Callable[[Path], None]:
    """A link whose blob is gone."""

    def spoil(snapshot: Path) -> None:
        (snapshot / name).resolve().unlink()

    return spoil


def absent(*names: str) -> Callable[[Path], None]:
    """Files that an interrupted download lacks."""

    def spoil(snapshot: Path) -> None:
        for name in names:
            (snapshot / name).unlink()

    return spoil


def half_of_the_weights(snapshot: Path) -> None:
    path = (snapshot / "model.safetensors").resolve()
    path.write_bytes(path.read_bytes()[:-100])


def one_of_two_shards(snapshot: Path) -> None:
    weights = load_file(snapshot / "model.safetensors")
    (snapshot / "model.safetensors").unlink()
    first = dict(list(weights.items())[:10])
    save_file(first, snapshot / "model-00001-of-00002.safetensors", metadata={"format": "pt"})
    shards = {name: f"model-0000{1 if name in first else 2}-of-00002.safetensors" for name in weights}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))


INCOMPLETE: dict[str, tuple[Callable[[Path], None], str]] = {
    "nothing yet": (lambda snapshot: [file.unlink() for file in snapshot.iterdir()], r"has no config\.json"),
    "no weights": (absent("model.safetensors"), r"model\.safetensors is missing or not"),
    "a link to nothing": (dangling("model.safetensors"), r"model\.safetensors is missing or not"),
    "a shard": (one_of_two_shards, r"model-00002-of-00002\.safetensors is missing or not"),
    "half a file": (half_of_the_weights, r"model\.safetensors is missing or not a complete safetensors file"),
    "no processor": (absent("processor_config.json"), r"has no processor_config\.json or preprocessor_config\.json"),
    "no tokenizer": (absent("tokenizer.json", "tokenizer_config.json"), "processor in .* cannot be loaded"),
}


# Existing files are downloaded again only by force.
FORCED = {"half a file", "no tokenizer"}


@pytest.mark.parametrize("case", INCOMPLETE)
def test_an_incomplete_snapshot_names_the_missing_file(snapshot: Path, case: str) -> None:
    spoil, message = INCOMPLETE[case]
    spoil(snapshot)
    command = "hf download Org/Tiny" + (" --force-download" if case in FORCED else "")
    with pytest.raises(ValueError, match=rf"(?s)^model: .*{message}.*; download it with: {command}$"):
        load(REPO)


def test_unneeded_files_may_be_missing(snapshot: Path) -> None:
    for name in ("README.md", "pytorch_model.bin", "training.json"):
        (snapshot / name).symlink_to(Path("../../blobs", "0" * 64))
    assert load(REPO)[0].name_or_path == str(snapshot)


def test_the_network_is_never_used(checkpoint: Path, tmp_path: Path) -> None:
    """Not even without HF_HUB_OFFLINE, in a process that records every connection."""
    put(checkpoint, tmp_path / "hub", REPO)
    absent("model.safetensors")(put(checkpoint, tmp_path / "hub", "Org/Part"))
    program = """
        import socket

        calls = []

        def refuse(*args, **kwargs):
            calls.append(args)
            raise OSError("no network")

        for name in ("getaddrinfo", "gethostbyname", "create_connection"):
            setattr(socket, name, refuse)
        socket.socket.connect = socket.socket.connect_ex = refuse

        from carve_kernels import load
        from carve_kernels.hf.loading import preset_of_checkpoint

        model, processor = load("Org/Tiny")
        assert preset_of_checkpoint("Org/Tiny").layers == (1,)
        for name in ("Org/Part", "Org/Nothing", "nothing"):
            try:
                load(name)
            except ValueError as error:
                assert f"hf download {name}" in str(error), error
            else:
                raise AssertionError(name)
        assert not calls, calls
        print(model.num_parameters())
    """
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_OFFLINE")}
    environment |= {"HF_HUB_CACHE": str(tmp_path / "hub"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0


def test_the_old_name_of_the_argument_still_works(checkpoint: Path) -> None:
    with pytest.warns(DeprecationWarning, match=r"^directory: this argument is called model now$") as warnings:
        load(directory=checkpoint)  # type: ignore[call-arg]
    assert warnings[0].filename == __file__
    with pytest.raises(TypeError, match=r"^directory: expected model alone"):
        load(checkpoint, model=checkpoint, directory=checkpoint)  # type: ignore[call-arg,misc]
