"""Loading a checkpoint: from this machine only, safetensors only unless the user insists."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForImageTextToText, PreTrainedModel

from carve_kernels import checks
from carve_kernels.deprecation import renamed
from carve_kernels.devices import usable
from carve_kernels.hf import checkpoint
from carve_kernels.hf.checkpoint import Checkpoint
from carve_kernels.hf.layouts import FAMILIES, supported
from carve_kernels.hf.processors import processor_of
from carve_kernels.presets import Preset

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PICKLES = "pytorch_model*.bin"
_PROFILE = "carve.json"

DTYPES: dict[str, str | torch.dtype] = {
    "auto": "auto",
    **dict.fromkeys(("float32", "float", "fp32"), torch.float32),
    **dict.fromkeys(("bfloat16", "bf16"), torch.bfloat16),
    **dict.fromkeys(("float16", "half", "fp16"), torch.float16),
    **dict.fromkeys(("float64", "double"), torch.float64),
}
"""What a dtype may be called."""


@renamed(directory="model")
def load(
    model: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    allow_pickle: bool = False,
) -> tuple[PreTrainedModel, Any]:
    """Load model and processor of a supported family, in eval mode.

    `model` is a checkpoint directory, "small" (the embedded model), or an id such as Org/Name, which is looked for in
    the local hub cache. A directory goes before an id of its name; one that is called small is "./small", or a Path.
    The model's `name_or_path` is the folder in which it was found, whole. `dtype` is "auto" (the checkpoint's own), a
    dtype of torch with a point that floats, or its name, short ones such as "bf16" too; `device` None leaves the model
    where it is loaded.

    Nothing is downloaded and no code of the checkpoint is run; `allow_pickle=True` admits pickle weights, which can run
    code of whoever wrote them. Without torchvision, a processor that needs it for videos alone is loaded for images.

    Raises ValueError, before any weight is read, if the checkpoint or a file in it is missing or broken (of an id with
    the command that fetches it), if the family is not supported, if the weights are pickles, for another dtype, or for
    a device that cannot be used here; ImportError if the processor needs a library that is missing.
    """
    wanted = dtype_of("dtype", dtype)
    place = None if device is None else usable("device", device)
    found = checkpoint.find(model)
    folder = found.folder
    family = _family(found)
    _check_weights(found, allow_pickle)
    _profile_in(folder)
    processor = _processor(found, family)
    loaded: Any = AutoModelForImageTextToText.from_pretrained(
        str(folder.absolute()),
        dtype=wanted,
        local_files_only=True,
        use_safetensors=not _has_only_pickles(folder),
        output_loading_info=True,
    )
    network, report = loaded
    # transformers fills what is missing with random numbers and only logs it.
    missing = sorted(report["missing_keys"])
    if missing:
        raise ValueError(f"model: the weights in {folder} lack {len(missing)} tensor(s), the first is {missing[0]!r}")
    if place is not None:
        network.to(place)
    return network.eval(), processor


def dtype_of(name: str, dtype: Any) -> str | torch.dtype:
    """The dtype of torch that a name means, or "auto"; ValueError for one that no model is loaded in."""
    if isinstance(dtype, torch.dtype) and dtype in DTYPES.values():
        return dtype
    if isinstance(dtype, str) and dtype.removeprefix("torch.") in DTYPES:
        return DTYPES[dtype.removeprefix("torch.")]
    raise ValueError(f"{name}: expected one of {', '.join(DTYPES)}, got {checks.describe(dtype)}")


def preset_in(name: str, path: str | os.PathLike[str]) -> Preset:
    """The preset in a JSON file such as carve.json; an error begins with `name` and the file."""
    found = checks.path(name, path)
    if not found.is_file():
        raise ValueError(f"{name}: expected the path of a carve.json, got {found}, which is no file")
    return _named(f"{name}: {found}", _json_object(name, found))


def preset_beside(model: str | Path) -> Preset | None:
    """The preset in the `carve.json` of a checkpoint, which is named as for `load`, or None if it has none."""
    return _preset_in_folder(checkpoint.find(model).folder)


def _preset_in_folder(folder: Path) -> Preset | None:
    values = _profile_in(folder)
    return None if values is None else _named(f"model: {folder / _PROFILE}", values)


def _named(name: str, values: Any) -> Preset:
    """A preset from a dict; an error says whose key it was."""
    try:
        return Preset.from_dict(values)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {str(error).removeprefix('preset: ')}") from error


def profile_of(model: str | Path) -> dict[str, Any] | None:
    """The `carve.json` of a checkpoint, which is named as for `load`, or None if it has none.

    Raises ValueError if there is no such checkpoint, or if the file holds no JSON object.
    """
    return _profile_in(checkpoint.find(model).folder)


def _profile_in(folder: Path) -> dict[str, Any] | None:
    path = folder / _PROFILE
    return _json_object("model", path) if path.is_file() else None


def _family(found: Checkpoint) -> str:
    folder, mend = found.folder, found.mend
    if not folder.is_dir():
        raise ValueError(f"model: expected a checkpoint directory, {folder} is a file")
    config = folder / "config.json"
    if not config.is_file():
        raise ValueError(f"model: {folder} has no config.json, so it is no whole checkpoint of transformers; {mend}")
    family = _json_object("model", config).get("model_type")
    if family not in FAMILIES:
        raise ValueError(f"model: expected a model_type of {supported()}, {config} says {family!r}")
    return str(family)


def _check_weights(found: Checkpoint, allow_pickle: bool) -> None:
    folder, mend = found.folder, found.mend
    if _has_only_pickles(folder):
        if allow_pickle:
            return
        raise ValueError(
            f"model: {folder} holds its weights as pickles ({_PICKLES}), which can run code when loaded; convert "
            "them to safetensors, or pass allow_pickle=True if you trust whoever wrote them"
        )
    index = folder / _INDEX
    if (folder / _SINGLE).is_file():
        shards = [_SINGLE]
    elif index.is_file():
        shards = sorted(set(_json_object("model", index).get("weight_map", {}).values()))
    else:
        raise ValueError(f"model: {folder} has no weights, neither {_SINGLE} nor {_INDEX}; {mend}")
    missing = [name for name in shards if not (folder / name).is_file()]
    if missing or not shards:
        told = ", ".join(missing) or "none at all"
        raise ValueError(f"model: {index} names weights that are not there: {told}; {mend}")
    for name in shards:
        try:
            with safe_open(folder / name, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"model: {folder / name} is no whole safetensors file ({error}); {found.mend_broken}"
            ) from error


def _has_only_pickles(folder: Path) -> bool:
    return any(folder.glob(_PICKLES)) and not any((folder / name).is_file() for name in (_SINGLE, _INDEX))


def _processor(found: Checkpoint, family: str) -> Any:
    folder, mend = found.folder, found.mend
    try:
        processor = processor_of(folder, family)
    except ImportError as error:
        raise ImportError(
            f"the processor of {folder} needs a library that is missing or does not fit; most often: "
            f"pip install torchvision ({error})"
        ) from error
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"model: the processor in {folder} cannot be loaded ({error}); {found.mend_broken}") from error
    if getattr(processor, "image_processor", None) is None:
        raise ValueError(
            f"model: {folder} has no processor for images (processor_config.json, preprocessor_config.json); {mend}"
        )
    return processor


def _json_object(argument: str, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{argument}: {path} cannot be read as JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{argument}: expected a JSON object in {path}, got {type(value).__name__}")
    return value


def preset_of(
    model: Any,
    preset: str | Preset | Mapping[str, Any] | None,
    profile: str | os.PathLike[str] | Mapping[str, Any] | bool | None,
) -> Preset:
    """The preset that a caller names, or else the profile's, by default the one in the model's directory, or "paper".

    Raises TypeError or ValueError for a preset or a profile that cannot be used.
    """
    if preset is not None:
        return Preset.of(preset)
    if isinstance(profile, bool):
        if profile:
            raise TypeError("profile: expected a dict, the path of a carve.json, None or False, got True")
        return Preset.paper()
    if isinstance(profile, Mapping):
        return _named("profile", profile)
    if profile is not None:
        return preset_in("profile", profile)
    # Whoever loaded the model may have named it by its id.
    folder = checkpoint.locate(model.name_or_path) if model.name_or_path else None
    return (folder and _preset_in_folder(folder)) or Preset.paper()
