"""Loading a checkpoint directory: from this machine only, safetensors only unless the user insists."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel

from carve_kernels.hf.layouts import FAMILIES, supported
from carve_kernels.presets import Preset

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PICKLES = "pytorch_model*.bin"


def load(
    directory: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    allow_pickle: bool = False,
) -> tuple[PreTrainedModel, Any]:
    """Load model and processor of a supported family from a local checkpoint directory, in eval mode.

    Nothing is downloaded and no code of the checkpoint is run; `allow_pickle=True` admits pickle weights, which can run
    code of whoever wrote them.

    Raises ValueError, before any weight is read, if the directory or a file in it is missing or broken, if the family
    is not supported, or if the weights are pickles; ImportError if the processor needs a library that is missing.
    """
    folder = Path(directory)
    _check_family(folder)
    _check_weights(folder, allow_pickle)
    profile_of(folder)
    processor = _processor(folder)
    loaded: Any = AutoModelForImageTextToText.from_pretrained(
        str(folder),
        dtype=dtype,
        local_files_only=True,
        use_safetensors=not _has_only_pickles(folder),
        output_loading_info=True,
    )
    model, report = loaded
    # transformers fills what is missing with random numbers and only logs it.
    missing = sorted(report["missing_keys"])
    if missing:
        raise ValueError(
            f"directory: the weights in {folder} lack {len(missing)} tensor(s), the first is {missing[0]!r}"
        )
    if device is not None:
        model.to(device)
    return model.eval(), processor


def profile_of(directory: str | Path) -> dict[str, Any] | None:
    """The `carve.json` of a checkpoint directory (or the file itself, by its path), or None if there is none.

    Raises ValueError if the file holds no JSON object.
    """
    path = Path(directory)
    path = path / "carve.json" if path.is_dir() else path
    return _json_object(path) if path.is_file() else None


def _check_family(folder: Path) -> None:
    if not folder.is_dir():
        raise ValueError(
            f"directory: expected a checkpoint directory, {folder} is {'a file' if folder.exists() else 'missing'}"
        )
    config = folder / "config.json"
    if not config.is_file():
        raise ValueError(f"directory: {folder} has no config.json, so it is no checkpoint of transformers")
    family = _json_object(config).get("model_type")
    if family not in FAMILIES:
        raise ValueError(f"directory: expected a model_type of {supported()}, {config} says {family!r}")


def _check_weights(folder: Path, allow_pickle: bool) -> None:
    if _has_only_pickles(folder):
        if allow_pickle:
            return
        raise ValueError(
            f"directory: {folder} holds its weights as pickles ({_PICKLES}), which can run code when loaded; convert "
            "them to safetensors, or pass allow_pickle=True if you trust whoever wrote them"
        )
    index = folder / _INDEX
    if (folder / _SINGLE).is_file():
        shards = [_SINGLE]
    elif index.is_file():
        shards = sorted(set(_json_object(index).get("weight_map", {}).values()))
    else:
        raise ValueError(f"directory: {folder} has no weights, neither {_SINGLE} nor {_INDEX}")
    missing = [name for name in shards if not (folder / name).is_file()]
    if missing or not shards:
        raise ValueError(f"directory: {index} names weights that are not there: {', '.join(missing) or 'none at all'}")
    for name in shards:
        try:
            with safe_open(folder / name, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"directory: {folder / name} is no whole safetensors file ({error}); copy it again"
            ) from error


def _has_only_pickles(folder: Path) -> bool:
    return any(folder.glob(_PICKLES)) and not any((folder / name).is_file() for name in (_SINGLE, _INDEX))


def _processor(folder: Path) -> Any:
    try:
        processor = AutoProcessor.from_pretrained(str(folder), local_files_only=True)
    except ImportError as error:
        raise ImportError(
            f"the processor of {folder} needs a library that is missing or does not fit; most often: "
            f"pip install torchvision ({error})"
        ) from error
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"directory: the processor in {folder} cannot be loaded ({error})") from error
    if getattr(processor, "image_processor", None) is None:
        raise ValueError(
            f"directory: {folder} has no processor for images (processor_config.json, preprocessor_config.json)"
        )
    return processor


def _json_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"directory: {path} cannot be read as JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"directory: expected a JSON object in {path}, got {type(value).__name__}")
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
        return Preset.from_dict(profile)
    if profile is not None:
        path = Path(profile)
        if not path.is_file():
            raise ValueError(f"profile: expected the path of a carve.json, got {path}, which is no file")
        found = profile_of(path)
    else:
        found = profile_of(model.name_or_path) if model.name_or_path else None
    return Preset.paper() if found is None else Preset.from_dict(found)
