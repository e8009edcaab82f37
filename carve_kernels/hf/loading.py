"""Loading a checkpoint: where it is on this machine, whether it is complete, its model and processor, its preset.

Nothing is downloaded, and weights are safetensors unless the caller allows pickles.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForImageTextToText, PreTrainedModel

from carve_kernels import checks
from carve_kernels.deprecation import renamed
from carve_kernels.devices import usable
from carve_kernels.hf.families import supported
from carve_kernels.hf.processors import is_image_text, processor_of
from carve_kernels.models import small
from carve_kernels.presets import Preset

SMALL = "small"
"""The name of the embedded model."""

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PICKLES = "pytorch_model*.bin"
_PROFILE = "carve.json"
_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")

DTYPES: dict[str, str | torch.dtype] = {
    "auto": "auto",
    **dict.fromkeys(("float32", "float", "fp32"), torch.float32),
    **dict.fromkeys(("bfloat16", "bf16"), torch.bfloat16),
    **dict.fromkeys(("float16", "half", "fp16"), torch.float16),
    **dict.fromkeys(("float64", "double"), torch.float64),
}
"""The names of a dtype."""


class Checkpoint(NamedTuple):
    """A checkpoint's folder, and what to do if a file in it is missing or broken."""

    folder: Path
    fix_missing: str
    fix_broken: str


@renamed(directory="model")
def load(
    model: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    allow_pickle: bool = False,
) -> tuple[PreTrainedModel, Any]:
    """Load a model that takes images and text, in eval mode, and its processor.

    `model` is a checkpoint directory, "small" (the embedded model), or an id such as Org/Name in the local hub cache. A
    directory takes precedence over an id of the same name; a directory called small is "./small", or a Path. The
    model's `name_or_path` becomes the absolute folder. `dtype` is "auto" (the checkpoint's), a floating-point dtype of
    torch, or its name, including short ones such as "bf16"; `device` None leaves the model where it is loaded.

    Nothing is downloaded and no code of the checkpoint is run; `allow_pickle=True` allows pickle weights, which can run
    code of their author. Without torchvision, a processor that needs it only for videos is loaded for images.

    Raises ValueError, before any weight is read, if the checkpoint or one of its files is missing or broken (for an id
    with the command that downloads it), if its model does not take images and text, if the weights are pickles, for an
    unknown dtype, or for a device that is unavailable; ImportError if the processor needs a missing library.
    """
    if not isinstance(allow_pickle, bool):
        raise TypeError(f"allow_pickle: expected True or False, got {checks.describe(allow_pickle)}")
    torch_dtype = dtype_of("dtype", dtype)
    target = None if device is None else usable("device", device)
    checkpoint, family = check_checkpoint(model, allow_pickle)
    folder = checkpoint.folder
    processor = _processor(checkpoint, family)
    loaded: Any = AutoModelForImageTextToText.from_pretrained(
        str(folder.absolute()),
        dtype=torch_dtype,
        local_files_only=True,
        use_safetensors=not _has_only_pickles(folder),
        output_loading_info=True,
    )
    network, report = loaded
    # transformers initialises missing tensors with random numbers and only logs it.
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"model: the weights in {folder} lack {len(missing)} tensor(s), the first is {missing[0]!r}")
    if target is not None:
        network.to(target)
    return network.eval(), processor


def check_checkpoint(model: str | os.PathLike[str], allow_pickle: bool = False) -> tuple[Checkpoint, str]:
    """A checkpoint and its model type, from its files alone. Raises what `load` raises before it reads any weight."""
    checkpoint = find(model)
    family = _family(checkpoint)
    _check_weights(checkpoint, allow_pickle)
    if (checkpoint.folder / _PROFILE).is_file():
        _json_object("model", checkpoint.folder / _PROFILE)
    return checkpoint, family


def dtype_of(name: str, dtype: Any) -> str | torch.dtype:
    """The dtype of torch of a name, or "auto". Raises ValueError for any other dtype."""
    if isinstance(dtype, torch.dtype) and dtype in DTYPES.values():
        return dtype
    if isinstance(dtype, str) and dtype.removeprefix("torch.") in DTYPES:
        return DTYPES[dtype.removeprefix("torch.")]
    raise ValueError(f"{name}: expected one of {', '.join(DTYPES)}, got {checks.describe(dtype)}")


def preset_in(name: str, path: str | os.PathLike[str]) -> Preset:
    """The preset in a JSON file such as carve.json; errors begin with `name` and the file."""
    file = checks.path(name, path)
    if not file.is_file():
        raise ValueError(f"{name}: expected the path of a carve.json, got {file}, which is not a file")
    return _preset(f"{name}: {file}", _json_object(name, file))


def preset_of_checkpoint(model: str | Path) -> Preset | None:
    """The preset in the `carve.json` of a checkpoint, named as for `load`, or None if it has none."""
    return _preset_in_folder(find(model).folder)


def _preset_in_folder(folder: Path) -> Preset | None:
    path = folder / _PROFILE
    return _preset(f"model: {path}", _json_object("model", path)) if path.is_file() else None


def _preset(name: str, values: Any) -> Preset:
    """A preset from a dict; errors begin with `name`."""
    try:
        return Preset.from_dict(values)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {str(error).removeprefix('preset: ')}") from error


def _family(checkpoint: Checkpoint) -> str:
    folder = checkpoint.folder
    if not folder.is_dir():
        raise ValueError(f"model: expected a checkpoint directory, {folder} is a file")
    config = folder / "config.json"
    if not config.is_file():
        raise ValueError(
            f"model: {folder} has no config.json, so it is not a complete checkpoint; {checkpoint.fix_missing}"
        )
    family = _json_object("model", config).get("model_type")
    if not isinstance(family, str) or not is_image_text(family):
        raise ValueError(
            f"model: expected a model that takes images and text, with a model_type such as {supported()}; {config} "
            f"says {family!r}"
        )
    return str(family)


def _check_weights(checkpoint: Checkpoint, allow_pickle: bool) -> None:
    """Refuse pickles, and name the missing or truncated file, which from_pretrained does not."""
    folder = checkpoint.folder
    if _has_only_pickles(folder):
        if allow_pickle:
            return
        raise ValueError(
            f"model: {folder} has its weights as pickles ({_PICKLES}), which can run code when loaded; convert "
            "them to safetensors, or pass allow_pickle=True if you trust their author"
        )
    index = folder / _INDEX
    shards = {_SINGLE}
    if index.is_file() and not (folder / _SINGLE).is_file():
        shards = set(_json_object("model", index).get("weight_map", {}).values())
    for file in sorted(folder / name for name in shards):
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            fix = checkpoint.fix_broken if file.is_file() else checkpoint.fix_missing
            raise ValueError(f"model: {file} is missing or not a complete safetensors file ({error}); {fix}") from error


def _has_only_pickles(folder: Path) -> bool:
    return any(folder.glob(_PICKLES)) and not any((folder / name).is_file() for name in (_SINGLE, _INDEX))


def _processor(checkpoint: Checkpoint, family: str) -> Any:
    folder, fix_missing, fix_broken = checkpoint
    if not any((folder / name).is_file() for name in _PROCESSOR_FILES):
        raise ValueError(f"model: {folder} has no {' or '.join(_PROCESSOR_FILES)}; {fix_missing}")
    try:
        processor = processor_of(folder, family)
    except ImportError as error:
        raise ImportError(
            f"the processor of {folder} needs a library that is missing or incompatible; most often: "
            f"pip install torchvision ({error})"
        ) from error
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"model: the processor in {folder} cannot be loaded ({error}); {fix_broken}") from error
    if getattr(processor, "image_processor", None) is None:
        raise ValueError(f"model: {folder} has no image processor ({', '.join(_PROCESSOR_FILES)}); {fix_missing}")
    return processor


def _json_object(argument: str, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{argument}: {path} cannot be read as JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{argument}: expected a JSON object in {path}, got {type(value).__name__}")
    return value


def resolve_preset(
    model: Any,
    preset: str | Preset | Mapping[str, Any] | None,
    profile: str | os.PathLike[str] | Mapping[str, Any] | bool | None,
) -> Preset:
    """The given preset, else the profile's (by default the carve.json of the model's directory), else "paper".

    Raises TypeError or ValueError for an invalid preset or profile.
    """
    is_known = profile is None or profile is False or isinstance(profile, (Mapping, str, os.PathLike))
    if not is_known:
        raise TypeError(
            f"profile: expected a dict, the path of a carve.json, None or False, got {checks.describe(profile)}"
        )
    if preset is not None:
        return Preset.of(preset)
    if isinstance(profile, bool):
        return Preset.paper()
    if isinstance(profile, Mapping):
        return _preset("profile", profile)
    if profile is not None:
        return preset_in("profile", profile)
    # The model may have been loaded by its id.
    folder = model.name_or_path and locate(model.name_or_path)
    return (folder and _preset_in_folder(folder)) or Preset.paper()


def find(model: str | os.PathLike[str]) -> Checkpoint:
    """A checkpoint, named as for `load`. Raises TypeError or ValueError if it is not on this machine."""
    if not isinstance(model, (str, os.PathLike)):
        raise TypeError(f"model: expected a directory, {SMALL!r} or an id, got {checks.describe(model)}")
    checks.path("model", model)
    name = os.fspath(model)
    if model == SMALL:
        return Checkpoint(small(), *["install carve_kernels again"] * 2)
    download = f"download it with: hf download {name}"
    folder = locate(model)
    if folder is not None:
        if os.path.exists(os.path.expanduser(name)):
            return Checkpoint(folder, "copy all of its files", "copy it again")
        # Without force, existing files are kept.
        return Checkpoint(folder, download, f"{download} --force-download")
    if isinstance(model, str) and _is_id(name):
        raise ValueError(
            f"model: {name!r} is not a directory, and the local hub cache has no main revision of a model with this "
            f"id; nothing is downloaded here: {download}"
        )
    raise ValueError(f"model: expected a checkpoint directory, {name} is missing")


def locate(name: str | os.PathLike[str]) -> Path | None:
    """The path itself if it exists, else the folder of this id in the local hub cache, or None."""
    path = Path(os.path.expanduser(name))
    if os.path.exists(path):
        return path
    if not isinstance(name, str) or not _is_id(name):
        return None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        # No file is required: the loader needs only some of a repository's files.
        return Path(snapshot_download(name, local_files_only=True, allow_patterns=[]))
    except LocalEntryNotFoundError:
        return None


def _is_id(name: str) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    with suppress(HFValidationError):
        validate_repo_id(name)
        return True
    return False
